package cloudhypervisor

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/vmcontract"
)

// TestRealBlockDevice plugs a block device of the host into a real VMM, with Landlock where there is any: the one
// directory that it may use is the VMM's own.
func TestRealBlockDevice(t *testing.T) {
	f := newRealFixture(t)
	c := f.driver.config
	c.HotplugDirs = nil
	f.driver = f.newDriver(c)
	t.Logf("landlock %v", f.driver.landlock)
	v := f.start()
	device, grow := vmcontract.LoopDevice(t, 16<<20)
	var st unix.Stat_t
	if err := unix.Fstat(int(device.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	for _, d := range []vmruntime.Disk{{Serial: "block-ro", Device: st.Rdev, ReadOnly: true}, {Serial: "block", Device: st.Rdev}} {
		for range 2 {
			if err := v.AddDisk(f.ctx(), d); err != nil {
				t.Error(err)
			}
		}
	}
	grow(32 << 20)
	for _, serial := range []string{"block-ro", "block"} {
		if err := v.ResizeDisk(f.ctx(), serial, 32<<20); err != nil {
			t.Error(err)
		}
		if err := v.ResizeDisk(f.ctx(), serial, 64<<20); err == nil {
			t.Error("a size that the device does not have is taken")
		}
	}
}
