package chclient

import (
	"testing"

	"github.com/containerd/errdefs"
)

func TestVersions(t *testing.T) {
	for _, tc := range []struct {
		text string
		want Version
		ok   bool
	}{
		{"cloud-hypervisor v53.0.0\nMigration Protocol Versions: 0\n", Version{53, 0}, true},
		{"cloud-hypervisor v53.0-dirty", Version{53, 0}, true},
		{"v53.0-12-gabcdef0", Version{53, 0}, true},
		{"v51.2", Version{51, 2}, true},
		{"54.1.0", Version{54, 1}, true},
		{"cloud-hypervisor v51.1", Version{51, 1}, false},
		{"cloud-hypervisor v52.0", Version{52, 0}, false},
		{"v52.1", Version{52, 1}, true},
		{"v50.2", Version{50, 2}, false},
		{"v9.9", Version{9, 9}, false},
		{"", Version{}, false},
		{"cloud-hypervisor", Version{}, false},
		{"v53", Version{}, false},
		{"x53.0", Version{}, false},
		{"v99999999999999999999.0", Version{}, false},
		{"crap\ncloud-hypervisor v53.0", Version{}, false},
	} {
		v, err := ParseVersion(tc.text)
		if v != tc.want || (err != nil) != (tc.want == Version{}) {
			t.Errorf("parse %q: %v, %v", tc.text, v, err)
		}
		err = CheckVersion(tc.text)
		if (err == nil) != tc.ok {
			t.Errorf("check %q: %v", tc.text, err)
		}
		if err != nil && v != (Version{}) && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("check %q: %v is no FailedPrecondition", tc.text, err)
		}
	}
}
