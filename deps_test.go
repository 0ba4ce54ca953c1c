package crivm

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/crivm/crivm/"

// allowed draws who imports whom: a package may import, of crivm, those below its own directory and these.
// Test-only packages stand here too, with what they test.
var allowed = map[string][]string{
	"agentproto":   nil,
	"cni":          nil,
	"conf":         nil,
	"imageservice": nil,
	"guest":        {"agentproto"},
	"vmruntime":    {"agentproto"},
	"server":       {"agentproto", "cni", "imageservice", "vmruntime"},
	"integration":  nil,
}

// criUsers are the only ones that see the CRI API; integration talks to its socket.
var criUsers = []string{"server", "imageservice", "integration", "cmd"}

type goPackage struct {
	ImportPath, Dir string
	Imports         []string
}

func TestWhoImportsWhom(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports", "./...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		path := strings.TrimPrefix(p.ImportPath, module)
		top, _, _ := strings.Cut(path, "/")
		seen[top] = true
		for _, imported := range p.Imports {
			switch {
			case strings.HasPrefix(imported, module):
				if other, _, _ := strings.Cut(strings.TrimPrefix(imported, module), "/"); !mayImport(path, top, other) {
					t.Errorf("%s imports %s; house rules: %s may import %v", path, imported, top, allowed[top])
				}
			case strings.HasPrefix(imported, "k8s.io/cri-") && !contains(criUsers, top):
				t.Errorf("%s imports %s; only %v see the CRI API", path, imported, criUsers)
			}
		}
	}
	for top := range allowed {
		if !seen[top] {
			t.Errorf("package %s of the drawing does not exist", top)
		}
	}
}

func mayImport(path, top, other string) bool {
	switch {
	case top == other, top == "cmd" && other != "integration":
		return true
	case path == "vmruntime/vmtest": // the fake Cloud Hypervisor, for tests, has the real agent behind it
		return other == "guest" || contains(allowed[top], other)
	}
	return contains(allowed[top], other)
}

func contains(list []string, s string) bool {
	for _, v := range list {
		if v == s {
			return true
		}
	}
	return false
}
