package guest

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestAwaitEvent: events of other subsystems do not end the wait, one of the wanted does, and so does its time.
func TestAwaitEvent(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	tell := func(subsystem string) {
		t.Helper()
		if _, err := unix.Write(fds[0], []byte("add@/devices/x\x00ACTION=add\x00SUBSYSTEM="+subsystem+"\x00SEQNUM=1\x00")); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 8<<10)
	for _, c := range []struct {
		name, subsystem string
		events          []string
		heard           bool
	}{
		{"the only one", "block", []string{"block"}, true},
		{"after others", "block", []string{"pci", "virtio", "block"}, true},
		{"before others", "block", []string{"block", "bdi"}, true},
		{"any", "", []string{"pci"}, true},
		{"others", "block", []string{"pci", "blocks", "bdi"}, false},
		{"none", "block", nil, false},
	} {
		for _, s := range c.events {
			tell(s)
		}
		most := 50 * time.Millisecond
		if c.heard {
			most = time.Hour
		}
		begin := time.Now()
		ended := make(chan error, 1)
		go func() { ended <- awaitEvent(fds[1], c.subsystem, buf, most) }()
		select {
		case err := <-ended:
			if err != nil || !c.heard && time.Since(begin) < most {
				t.Errorf("%s: %v after %v", c.name, err, time.Since(begin))
			}
		case <-time.After(time.Minute):
			t.Fatalf("%s: not heard", c.name)
		}
	}
}
