//go:build integration

package guest

import (
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/crivm/crivm/agentproto"
)

func TestTmp(t *testing.T) {
	vm := bootVM(t)
	settled(t, vm)
	if os.Getenv("NOREH") == "" {
		resp, err := vm.Rehearse(testContext(t), rehearsalRequest(t, vm, "rehearsal"))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%v", resp.GetSteps())
	}
	ctx := testContext(t)
	cpu := func(name string, f func() (any, error)) {
		busy, begin := vm.busy(t), time.Now()
		r, err := f()
		if err != nil {
			t.Fatal(name, err)
		}
		t.Logf("%-10s %6.1f ms CPU %6.1f ms %v", name, float64(vm.busy(t)-busy)/1e6, float64(time.Since(begin))/1e6, r)
	}
	cpu("setup", func() (any, error) {
		r, err := vm.SetupSandbox(ctx, &agentproto.SetupSandboxRequest{
			SandboxId: "pod", Hostname: "pod-1", UnixNanos: time.Now().UnixNano(), Entropy: make([]byte, 32), ScratchSerial: "scratch", MachineId: strings.Repeat("0123", 8),
			Interfaces: []*agentproto.Interface{{MatchMac: vm.mac, Mac: "0a:58:0a:01:02:03", Name: "eth0", Addresses: []string{"10.1.2.3/24", "fd00::3/64"}}},
			Routes: []*agentproto.Route{
				{Destination: "0.0.0.0/0", Gateway: "10.1.2.1", Interface: "eth0"}, {Destination: "::/0", Gateway: "fd00::1", Interface: "eth0"},
			},
		})
		return r.GetSteps(), err
	})
	for i := range 3 {
		id := fmt.Sprint("c", i)
		cpu("create", func() (any, error) {
			r, err := vm.CreateContainer(ctx, &agentproto.CreateContainerRequest{ContainerId: id, Rootfs: &agentproto.Rootfs{ImageSerial: "img-busybox"}, OciSpec: rehearsalRequest(t, vm, "sleep", "1000").GetContainer().GetOciSpec()})
			return r.GetSteps(), err
		})
		cpu("start", func() (any, error) {
			r, err := vm.StartContainer(ctx, &agentproto.StartContainerRequest{ContainerId: id})
			return r.GetSteps(), err
		})
		for j := range 3 {
			x := fmt.Sprint("x", j)
			cpu("exec", func() (any, error) {
				r, err := vm.Exec(ctx, &agentproto.ExecRequest{ContainerId: id, ExecId: x, Args: strings.Split(os.Getenv("ARGS"), " "), Stdio: &agentproto.Stdio{}})
				return r.GetSteps(), err
			})
			time.Sleep(2 * time.Second)
			cpu("out", func() (any, error) {
				for _, e := range []bool{false, true} {
					o, err := vm.Output(ctx, &agentproto.Output{ContainerId: id, ExecId: x, Stderr: e})
					if err != nil {
						return nil, err
					}
					io.Copy(io.Discard, o)
					o.Close()
				}
				return nil, nil
			})
			cpu("wait", func() (any, error) { return vm.Wait(ctx, &agentproto.WaitRequest{ContainerId: id, ExecId: x}) })
			cpu("delete", func() (any, error) { return vm.DeleteExec(ctx, &agentproto.DeleteExecRequest{ContainerId: id, ExecId: x}) })
		}
	}
}
