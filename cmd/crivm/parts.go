package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/crivm/crivm/cni"
	"github.com/crivm/crivm/conf"
	"github.com/crivm/crivm/imageservice"
	"github.com/crivm/crivm/server"
)

func openNetwork(config conf.Config) (*cni.Network, error) {
	network, err := cni.New(cni.Config{
		ConfDir: config.CNI.ConfDir, BinDirs: config.CNI.BinDirs, CacheDir: config.CNI.CacheDir, NetnsDir: config.CNI.NetnsDir,
		AddTimeout: time.Duration(config.CNI.AddTimeout), DelTimeout: time.Duration(config.CNI.DelTimeout),
	})
	if err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	return network, nil
}

func imageConfig(config conf.Config) imageservice.Config {
	return imageservice.Config{
		Root: config.Image.Root, RunRoot: config.Image.RunRoot, DiskDir: config.Image.DiskDir, ScratchDir: filepath.Join(config.StateDir, "pods"),
		RegistriesConf: config.Image.RegistriesConf, RegistriesConfDir: config.Image.RegistriesConfDir, SignaturePolicy: config.Image.SignaturePolicy,
		AuthFile: config.Image.AuthFile, CertsDir: config.Image.CertsDir, ShortNameAliases: config.Image.ShortNameAliases,
		PullProgressTimeout: time.Duration(config.Image.PullProgressTimeout), MaxParallelDownloads: config.Image.MaxParallelDownloads, Pinned: config.Image.Pinned,
	}
}

// poolCalm is more than kubelet takes from one call of a pod's start to the next.
const poolCalm = time.Second

func serverOptions(config conf.Config, handlers map[string]server.Handler, warnings []string) server.Options {
	systemd := systemdCgroups(config.CRI.CgroupDriver)
	return server.Options{
		Version: version, StateDir: config.StateDir, RunDir: config.RunDir, Handlers: handlers, Warnings: warnings,
		SystemdCgroups: systemd, CgroupParent: config.CRI.ParentCgroup(systemd),
		MaxLogLine: int(config.CRI.MaxContainerLogLineSize), StreamAddress: config.CRI.StreamAddress, StreamIdleTimeout: time.Duration(config.CRI.StreamIdleTimeout),
		PoolBoots: config.Pool.ParallelBoots, PoolCalm: poolCalm, PoolWeight: config.Pool.CPUWeight, UIDBase: config.VMUsers.Base, UIDCount: config.VMUsers.Count,
	}
}

// lateImages opens the image store when it is asked for its leftovers: after the records, whose lock tells that no daemon
// uses it.
type lateImages struct {
	config  imageservice.Config
	service *imageservice.Service
}

func (i *lateImages) Leftovers(ctx context.Context, remove bool) (_ []imageservice.Leftover, err error) {
	if i.service == nil {
		if i.service, err = imageservice.New(ctx, i.config); err != nil {
			return nil, err
		}
	}
	return i.service.Leftovers(ctx, remove)
}

func (i *lateImages) Close() error {
	if i.service == nil {
		return nil
	}
	return i.service.Close()
}
