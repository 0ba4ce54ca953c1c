package cloudhypervisor

import (
	"os"
	"testing"

	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/vmcontract"
)

// TestContract runs what every driver has to pass, against the fake.
func TestContract(t *testing.T) {
	vmcontract.Run(t, vmcontract.Options{
		New: func(t *testing.T) (vmruntime.Driver, vmruntime.Spec) {
			f := newFixture(t)
			s := f.spec
			s.Dir, s.Disks = "", nil // the suite has directories of its own
			if err := os.Remove(f.spec.Dir); err != nil {
				t.Fatal(err)
			}
			return f.driver, s
		},
	})
}
