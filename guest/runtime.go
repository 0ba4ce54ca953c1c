package guest

import (
	"context"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// Runtime makes and runs containers for an Agent. A guest uses one that drives crun or runc;
// NewProcessRuntime runs plain processes, for tests on machines that cannot isolate.
//
// An Agent calls the methods for one container one at a time, except Exec, Stats and SignalAll.
type Runtime interface {
	// Version is one line for people, or "" while it is not known. It does not wait.
	Version() string
	// Create makes a container of b up to its process, which waits for Start. The process may be nil when
	// there is none before Start. A command that cannot be executed may be reported here or by Start, as
	// a commandFailure.
	Create(ctx context.Context, b Bundle) (*Started, error)
	// Start lets the process run. It returns it when Create has not.
	Start(ctx context.Context, id string) (*Child, error)
	// Exec runs a further process. Errors as for Create.
	Exec(ctx context.Context, id string, p *specs.Process, stdio ChildStdio) (*Started, error)
	// SignalAll signals every process of the container. Nil when there is none.
	SignalAll(ctx context.Context, id string, sig unix.Signal) error
	// KillTree kills a process of the container and what it started, as far as that can be told apart.
	KillTree(id string, child *Child)
	// Delete kills what is left and forgets the container. Idempotent.
	Delete(ctx context.Context, id string) error
	// OOMKilled tells whether the kernel killed a process of the container for want of memory.
	OOMKilled(id string) bool
	// Update changes the limits of a container.
	Update(ctx context.Context, id string, r *specs.LinuxResources) error
	// Stats fills what the container's cgroup tells; open files are counted on demand only. NotFound without
	// a cgroup.
	Stats(id string, descriptors bool, s *agentproto.ContainerStats) error
}

// Bundle is what a Runtime makes a container of.
type Bundle struct {
	ID    string
	Dir   string // private to the container, exists
	Spec  *specs.Spec
	Stdio ChildStdio
}

// ChildStdio holds the container's ends of the pipes. The caller closes them when the call has returned.
type ChildStdio struct {
	Stdin, Stdout, Stderr *os.File // nil ones are /dev/null; unused with Terminal
	Terminal              bool     // a new pseudo terminal, whose master is returned in Started
}

// Started is what came of Create or Exec.
type Started struct {
	Process *Child
	Master  *os.File // with Terminal: non-blocking, owned by the receiver
}
