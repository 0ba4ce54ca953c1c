package guest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/crivm/crivm/agentproto"
)

func TestCalmRuntime(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: another thread's timer slack is changed")
	}
	if err := calmRuntime(); err != nil {
		t.Fatal(err)
	}
	tasks, err := filepath.Glob("/proc/self/task/*")
	if err != nil {
		t.Fatal(err)
	}
	calm := 0
	for _, task := range tasks {
		b, err := os.ReadFile(filepath.Join("/proc", filepath.Base(task), "timerslack_ns"))
		if err == nil && strings.TrimSpace(string(b)) == "1000000" {
			calm++
		}
	}
	if calm == 0 {
		t.Errorf("none of %d threads has a timer slack of a millisecond", len(tasks))
	}
}

func TestBootModules(t *testing.T) {
	all := []string{"virtio_pci", "virtio_console", "vsock", "vmw_vsock_virtio_transport"}
	for kind, want := range map[string][]string{
		agentproto.TransportVsock: all, "": all,
		agentproto.TransportSerial: {"virtio_pci", "virtio_console"},
	} {
		if got := bootModules(all, kind); !slices.Equal(got, want) {
			t.Errorf("%q loads %v, want %v", kind, got, want)
		}
	}
	if len(all) != 4 || all[3] != "vmw_vsock_virtio_transport" {
		t.Errorf("the manifest's list has become %v", all)
	}
}
