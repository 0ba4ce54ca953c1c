package server

import cri "k8s.io/cri-api/pkg/apis/runtime/v1"

// validateMountOptions takes the options that CRI names: each takes something away from the container, and the guest's
// kernel enforces them. Others could give it something.
func validateMountOptions(field string, m *cri.Mount) error {
	for _, o := range m.GetMountOptions() {
		if o != "noexec" && o != "nodev" && o != "nosuid" {
			return unsupported(field+".mount_options", "%q is none of noexec, nodev and nosuid", o)
		}
	}
	return nil
}
