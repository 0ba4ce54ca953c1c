package server

import (
	"context"

	"github.com/crivm/crivm/cni"
	"github.com/crivm/crivm/imageservice"
	"github.com/crivm/crivm/vmruntime"
)

// Network makes pod networks (package cni).
type Network interface {
	Prepare(ctx context.Context, id string, tapUID, tapGID int) (cni.Slot, error)
	Add(ctx context.Context, p cni.Pod) (cni.Attachment, error)
	Del(ctx context.Context, p cni.Pod) error
	GC(ctx context.Context, keep []string) error
	Traces() ([]cni.Trace, error)
	Status() error
}

// Images finds images and their disks (package imageservice).
type Images interface {
	Resolve(ctx context.Context, ref string) (imageservice.Image, error)
	Disk(ctx context.Context, imageID string) (string, error)
}

// Driver starts VMs (package vmruntime).
type Driver = vmruntime.Driver
