package server

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/vmcontract"
)

func TestValidateDevices(t *testing.T) {
	device := func(container, host, permissions string) *cri.Device {
		return &cri.Device{ContainerPath: container, HostPath: host, Permissions: permissions}
	}
	for name, tt := range map[string]struct {
		devices []*cri.Device
		want    string
	}{
		"none":               {nil, ""},
		"all":                {[]*cri.Device{device("/dev/xvda", "/dev/loop0", "mrw"), device("/data", "/dev/loop0", "r")}, ""},
		"relative container": {[]*cri.Device{device("dev/xvda", "/dev/loop0", "mrw")}, "devices[0].container_path"},
		"root":               {[]*cri.Device{device("/..", "/dev/loop0", "mrw")}, "devices[0].container_path"},
		"twice":              {[]*cri.Device{device("/dev/a", "/dev/loop0", "mrw"), device("/dev/./a", "/dev/loop1", "mrw")}, "devices[1].container_path"},
		"relative host":      {[]*cri.Device{device("/dev/xvda", "loop0", "mrw")}, "devices[0].host_path"},
		"no permissions":     {[]*cri.Device{device("/dev/xvda", "/dev/loop0", "")}, "devices[0].permissions"},
		"other permissions":  {[]*cri.Device{device("/dev/xvda", "/dev/loop0", "rx")}, "devices[0].permissions"},
	} {
		err := validateDevices(tt.devices)
		if tt.want == "" && err != nil || tt.want != "" && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}

func TestFindHostDevice(t *testing.T) {
	dir := t.TempDir()
	file, fifo := filepath.Join(dir, "file"), filepath.Join(dir, "fifo")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(fifo, 0o644); err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]string{
		"/dev/null": "character device", file: "regular file", fifo: "not a block device", dir: "not a block device", filepath.Join(dir, "none"): "no such file",
	} {
		_, err := findHostDevice("config.devices[0]", &cri.Device{HostPath: host, ContainerPath: "/dev/x", Permissions: "rw"})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "config.devices[0].host_path") {
			t.Errorf("%s: %v, want %q", host, err, want)
		}
	}
	if os.Geteuid() != 0 {
		t.Skip("the rest opens block devices, as root")
	}
	loop, _ := vmcontract.LoopDevice(t, 1<<20)
	link := filepath.Join(dir, "link")
	if err := os.Symlink(loop.Name(), link); err != nil {
		t.Fatal(err)
	}
	d, err := findHostDevice("f", &cri.Device{HostPath: link, ContainerPath: "/dev/x/", Permissions: "rwm"})
	if err != nil || d.readOnly || d.containerPath != "/dev/x" || d.number == 0 {
		t.Errorf("device is %+v (%v)", d, err)
	}
	if d, err = findHostDevice("f", &cri.Device{HostPath: link, ContainerPath: "/dev/x", Permissions: "mr"}); err != nil || !d.readOnly {
		t.Errorf("device is %+v (%v)", d, err)
	}
	for _, readOnly := range []bool{false, true} {
		if number, ok := deviceNumber(d.serial(readOnly)); !ok || number != d.number {
			t.Errorf("%s is read as %d", d.serial(readOnly), number)
		}
	}
	if _, ok := deviceNumber("img-0011223344556677"); ok {
		t.Error("the disk of an image is taken for a device")
	}
}

func TestChangedBlockDevice(t *testing.T) {
	for event, want := range map[string]uint64{
		"change@/devices/virtual/block/loop3\x00ACTION=change\x00SUBSYSTEM=block\x00MAJOR=7\x00MINOR=3\x00RESIZE=1\x00": unix.Mkdev(7, 3),
		"add@/devices/virtual/block/loop3\x00ACTION=add\x00SUBSYSTEM=block\x00MAJOR=7\x00MINOR=3\x00":                   0,
		"change@/x\x00ACTION=change\x00SUBSYSTEM=tty\x00MAJOR=7\x00MINOR=3\x00":                                         0,
		"change@/x\x00ACTION=change\x00SUBSYSTEM=block\x00":                                                             0,
		"": 0,
	} {
		if got, ok := changedBlockDevice([]byte(event)); got != want || ok != (want != 0) {
			t.Errorf("%q: %d", event, got)
		}
	}
}

// A device is plugged once for a pod, whatever the daemon goes through, is told of when it grows, and goes with its last
// user.
func TestBlockDevices(t *testing.T) {
	r := newRig(t)
	loop, grow := vmcontract.LoopDevice(t, 1<<20)
	var st unix.Stat_t
	if err := unix.Fstat(int(loop.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	writable, readOnly := hostDevice{number: st.Rdev}.serial(false), hostDevice{number: st.Rdev}.serial(true)
	pod := r.runPod("a")
	create := func(name, permissions string) (string, error) {
		req := r.createRequest(pod, name, "exec sleep 1000")
		req.Config.Devices = []*cri.Device{{HostPath: loop.Name(), ContainerPath: "/dev/xvda", Permissions: permissions}}
		resp, err := r.CreateContainer(t.Context(), req)
		return resp.GetContainerId(), err
	}
	has := func(serial string) bool {
		vm, err := r.sandbox(pod).machine()
		if err != nil {
			t.Fatal(err)
		}
		disk := vmruntime.Disk{Serial: serial, Path: r.img.disk, ReadOnly: true}
		if err := vm.AddDisk(t.Context(), disk); err != nil { // another has the serial
			if !errdefs.IsAlreadyExists(err) {
				t.Fatal(err)
			}
			return true
		}
		if err := vm.RemoveDisk(t.Context(), serial); err != nil {
			t.Fatal(err)
		}
		return false
	}
	reader, err := create("reader", "r")
	if err != nil {
		t.Fatal(err)
	}
	if !has(readOnly) || has(writable) {
		t.Error("a device for reading is not a read-only disk")
	}
	if _, err := create("refused", "rw"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "permissions") {
		t.Errorf("a device both ways: %v", err)
	}
	if _, err := r.RemoveContainer(t.Context(), &cri.RemoveContainerRequest{ContainerId: reader}); err != nil {
		t.Fatal(err)
	}
	writer, err := create("writer", "mrw")
	if err != nil {
		t.Fatal(err)
	}
	reader, err = create("reader2", "r")
	if err != nil {
		t.Fatal(err)
	}
	if !has(writable) || has(readOnly) {
		t.Error("two containers have two disks of one device")
	}
	r.restart()
	for _, id := range []string{writer, reader} {
		if rec, err := r.store.Container(id); err != nil || !slices.Equal(rec.VolumeDisks, []string{writable}) || rec.State != store.ContainerCreated {
			t.Errorf("record is %+v (%v)", rec, err)
		}
	}
	grow(2 << 20)
	deadline := time.Now().Add(30 * time.Second)
	for vm, _ := r.sandbox(pod).machine(); vm.ResizeDisk(t.Context(), writable, 2<<20) != nil; { // the fake takes the true size only
		if time.Now().After(deadline) {
			t.Fatal("the device does not grow")
		}
	}
	for n, id := range []string{writer, reader} {
		if !has(writable) {
			t.Error("the disk is gone before its last user")
		}
		if _, err := r.RemoveContainer(t.Context(), &cri.RemoveContainerRequest{ContainerId: id}); err != nil {
			t.Fatal(err)
		}
		if left := has(writable); left != (n == 0) {
			t.Errorf("after %d of 2 users the disk is there: %v", n+1, left)
		}
	}
}

func TestNeededHugepages(t *testing.T) {
	limits := func(bytes uint64) *cri.LinuxContainerResources {
		return &cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "1GB"}, {PageSize: "2MB", Limit: bytes}}}
	}
	container := func(state store.ContainerState, bytes uint64) store.Container {
		return store.Container{State: state, Config: store.ContainerConfig{ContainerConfig: &cri.ContainerConfig{Linux: &cri.LinuxContainerConfig{Resources: limits(bytes)}}}}
	}
	containers := []store.Container{container(store.ContainerRunning, 4<<20), container(store.ContainerCreating, 2<<20), container(store.ContainerExited, 8<<20)}
	if got := neededHugepages(nil, containers); got != 6<<20 {
		t.Errorf("containers need %d", got)
	}
	if got := neededHugepages(limits(32<<20), containers); got != 32<<20 {
		t.Errorf("a pod with a limit needs %d", got)
	}
	if got := neededHugepages(limits(0), nil); got != 0 {
		t.Errorf("nothing needs %d", got)
	}
	if err := fitHugepages("f", 64<<20, guestReserve+32<<20); !errdefs.IsOutOfRange(err) {
		t.Errorf("more than there is: %v", err)
	}
	for name, limit := range map[string]*cri.HugepageLimit{"half a page": {PageSize: "2MB", Limit: 1 << 20}, "huge": {PageSize: "2MB", Limit: 1<<64 - 2<<20}} {
		if err := validateHugepages("f", []*cri.HugepageLimit{limit}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	merged := mergeHugepages(limits(4<<20).HugepageLimits, []*cri.HugepageLimit{{PageSize: "2MB", Limit: 8 << 20}, {PageSize: "64KB"}})
	if len(merged) != 3 || merged[1].Limit != 8<<20 {
		t.Errorf("merged limits are %v", merged)
	}
}
