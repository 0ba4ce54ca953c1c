package server

import (
	"fmt"
	"log/slog"
	"math"
	"path"
	"strings"
	"sync"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// validateForm refuses what no field of any configuration can have: values that an enum does not define, and
// texts with a zero byte, which the kernel would cut off. Fields of a newer CRI are told of in the log.
func validateForm(field string, m proto.Message) error {
	return formOf(field, m.ProtoReflect())
}

var newerFields sync.Once

func formOf(field string, m protoreflect.Message) (err error) {
	if len(m.GetUnknown()) > 0 {
		newerFields.Do(func() {
			slog.Warn("a configuration has fields of a newer CRI, which are ignored; this is said once", "in", field)
		})
	}
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		name := field + "." + string(fd.Name())
		switch {
		case fd.IsMap():
			v.Map().Range(func(key protoreflect.MapKey, value protoreflect.Value) bool {
				if err = formOfValue(name, fd.MapKey(), key.Value()); err == nil {
					err = formOfValue(name, fd.MapValue(), value)
				}
				return err == nil
			})
		case fd.IsList():
			for i := range v.List().Len() {
				if err = formOfValue(fmt.Sprintf("%s[%d]", name, i), fd, v.List().Get(i)); err != nil {
					break
				}
			}
		default:
			err = formOfValue(name, fd, v)
		}
		return err == nil
	})
	return err
}

func formOfValue(name string, fd protoreflect.FieldDescriptor, v protoreflect.Value) error {
	switch fd.Kind() {
	case protoreflect.MessageKind:
		return formOf(name, v.Message())
	case protoreflect.EnumKind:
		if fd.Enum().Values().ByNumber(v.Enum()) == nil {
			return invalid(name, "%d is not a value of %s", v.Enum(), fd.Enum().Name())
		}
	case protoreflect.StringKind:
		if strings.Contains(v.String(), "\x00") {
			return invalid(name, "%q has a zero byte", v.String())
		}
	}
	return nil
}

// validateIDs checks users and groups: the kernel's are 32 bits wide, and the last one means "none".
func validateIDs(field string, user, group *cri.Int64Value, groups []int64) error {
	for _, id := range []struct {
		name  string
		value *cri.Int64Value
	}{{"run_as_user", user}, {"run_as_group", group}} {
		if n := id.value.GetValue(); n < 0 || n >= math.MaxUint32 {
			return invalid(field+"."+id.name, "%d is not an ID", n)
		}
	}
	for _, n := range groups {
		if n < 0 || n >= math.MaxUint32 {
			return invalid(field+".supplemental_groups", "%d is not an ID", n)
		}
	}
	return nil
}

func validatePaths(field string, paths []string) error {
	for _, p := range paths {
		if !path.IsAbs(p) {
			return invalid(field, "%q is not absolute", p)
		}
	}
	return nil
}

// validateImage checks what an image specification says beyond the reference.
func (s *Server) validateImage(field string, image *cri.ImageSpec) error {
	if name := image.GetRuntimeHandler(); name != "" {
		if _, ok := s.opts.Handlers[name]; !ok {
			return invalid(field+".runtime_handler", "%q is not configured", name)
		}
	}
	return nil
}

var relabels sync.Once

// tellIgnored says aloud, once, what a container asks for and nothing in a VM could do.
func (s *Server) tellIgnored(config *cri.ContainerConfig) {
	for _, m := range config.GetMounts() {
		if m.GetSelinuxRelabel() {
			relabels.Do(func() {
				s.log.Warn("selinux_relabel of a mount is ignored: the guest kernel has no SELinux, and labels of the host's files do not reach it; this is said once",
					"container", config.GetMetadata().GetName(), "mount", m.GetContainerPath())
			})
		}
	}
}
