package vmruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// stateBytes bounds a state file.
const stateBytes = 1 << 20

// SaveState replaces a small JSON file in a VM's directory atomically. It is not synced: after a crash of
// the host the VM that it describes is gone as well. A VMM may be able to write to its directory, so
// nothing there is followed.
func SaveState(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("state %s: %w", path, err)
	}
	_ = os.Remove(path + ".new") // of a writer that was interrupted
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("save state: %w", err)
	}
	return nil
}

// LoadState reads what SaveState wrote, unless somebody else wrote it: a VMM that a guest has taken over
// must not choose which process is killed or which cgroup is removed. os.ErrNotExist when there is none.
func LoadState(path string, v any) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("load state: %w", err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("load state %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 || st.Nlink != 1 {
		return fmt.Errorf("load state %s: not written by this daemon", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, stateBytes))
	if err != nil {
		return fmt.Errorf("load state %s: %w", path, err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("load state %s: %w", path, err)
	}
	return nil
}

// RemoveState removes what SaveState wrote, if anything.
func RemoveState(path string) {
	_ = os.Remove(path + ".new")
	_ = os.Remove(path)
}
