// Package store keeps the records of sandboxes and containers in one bbolt database and serves every read
// from memory. It owns names, states and times; it never touches a VM, a network or a file of a pod.
//
// Schema of the database (schema version 2; migrate.go tells of the others):
//
//	v1
//	├── meta
//	│   ├── schema      "2"
//	│   ├── schema.sum  sum of it
//	│   ├── created     the last created_at given out, in ns since the epoch (decimal)
//	│   └── digest      the sums of all records, added
//	├── sandboxes
//	│   └── <id>        sum, a space, Sandbox as JSON
//	└── containers
//	    └── <id>        sum, a space, Container as JSON
//
// A sum is the first 8 bytes of SHA-256 over bucket, ID and JSON, in hex. The file is written anew at each start, from
// what of it can be believed (open.go).
//
// A change is on disk (bbolt commits with fsync) before the call that makes it returns, and only then
// visible to readers, so that nothing is ever seen that a crash can take back.
package store

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

var (
	bucketRoot       = []byte("v1")
	bucketMeta       = []byte("meta")
	bucketSandboxes  = []byte("sandboxes")
	bucketContainers = []byte("containers")
	keySchema        = []byte("schema")
	keySchemaSum     = []byte("schema.sum")
	keyCreated       = []byte("created")
	keyDigest        = []byte("digest")

	recordBuckets = [][]byte{bucketSandboxes, bucketContainers}
)

// Store is safe for concurrent use. Readers never wait for a write to disk.
type Store struct {
	path   string
	locks  [2]*os.File // of the lock file and, when read only, of the database
	found  int         // schema that the file had
	damage string

	write  sync.Mutex        // serialises changes, held over the commit
	db     *bolt.DB          // nil: read only. Guarded by write, as the next two
	sums   map[string]uint64 // by bucket and ID
	digest uint64            // of all records

	mu         sync.RWMutex // guards the fields below, never held over I/O
	sandboxes  records[Sandbox]
	containers records[Container]
	names      map[string]string // reserved name to ID; sandbox and container names differ by prefix

	created int64 // last created_at; guarded by write

	observers Observers // guarded by write
}

// Observers are told of every change of a record, one change at a time and in the order in which readers see
// them. nil stands for a record that is not there: before its creation, after its deletion. They must not
// change records, and hold up everything that does.
type Observers struct {
	Sandbox   func(before, after *Sandbox)
	Container func(before, after *Container)
}

// Observe sets who is told of changes from now on.
func (s *Store) Observe(o Observers) {
	s.write.Lock()
	defer s.write.Unlock()
	s.observers = o
}

func (s *Store) sandboxChanged(before, after *Sandbox) {
	if s.observers.Sandbox != nil {
		s.observers.Sandbox(before, after)
	}
}

func (s *Store) containerChanged(before, after *Container) {
	if s.observers.Container != nil {
		s.observers.Container(before, after)
	}
}

// Damage tells what was lost when the database was opened; "" nothing.
func (s *Store) Damage() string { return s.damage }

// Close releases the database.
func (s *Store) Close() error {
	var errs []error
	if s.db != nil {
		errs = append(errs, s.db.Close())
	}
	for _, f := range s.locks {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

func sandboxName(r Sandbox) string     { return "s/" + r.Name }
func containerName(r Container) string { return "c/" + r.Name }

// CreateSandbox reserves the name and writes the record with a new creation time. AlreadyExists, naming
// the holder's ID, when the name is taken.
func (s *Store) CreateSandbox(r Sandbox) (Sandbox, error) {
	s.write.Lock()
	defer s.write.Unlock()
	if id, taken := s.nameHolder(sandboxName(r)); taken {
		return Sandbox{}, fmt.Errorf("sandbox name %q is reserved for %s: %w", r.Name, id, errdefs.ErrAlreadyExists)
	}
	r.CreatedAt = s.nextCreated()
	if err := s.put(bucketSandboxes, r.ID, r); err != nil {
		return Sandbox{}, err
	}
	s.mu.Lock()
	s.sandboxes.add(r.ID, r)
	s.names[sandboxName(r)] = r.ID
	s.mu.Unlock()
	s.sandboxChanged(nil, &r)
	return r, nil
}

// CreateContainer is CreateSandbox's like.
func (s *Store) CreateContainer(r Container) (Container, error) {
	s.write.Lock()
	defer s.write.Unlock()
	if id, taken := s.nameHolder(containerName(r)); taken {
		return Container{}, fmt.Errorf("container name %q is reserved for %s: %w", r.Name, id, errdefs.ErrAlreadyExists)
	}
	r.CreatedAt = s.nextCreated()
	if err := s.put(bucketContainers, r.ID, r); err != nil {
		return Container{}, err
	}
	s.mu.Lock()
	s.containers.add(r.ID, r)
	s.names[containerName(r)] = r.ID
	s.mu.Unlock()
	s.containerChanged(nil, &r)
	return r, nil
}

// UpdateSandbox changes a record by a function; its error leaves the record as it was.
func (s *Store) UpdateSandbox(id string, change func(*Sandbox) error) (Sandbox, error) {
	s.write.Lock()
	defer s.write.Unlock()
	r, err := s.Sandbox(id)
	if err != nil {
		return Sandbox{}, err
	}
	before := r
	if err := change(&r); err != nil {
		return Sandbox{}, err
	}
	if err := s.put(bucketSandboxes, r.ID, r); err != nil {
		return Sandbox{}, err
	}
	s.mu.Lock()
	s.sandboxes.change(r.ID, r)
	s.mu.Unlock()
	s.sandboxChanged(&before, &r)
	return r, nil
}

// UpdateContainer is UpdateSandbox's like.
func (s *Store) UpdateContainer(id string, change func(*Container) error) (Container, error) {
	s.write.Lock()
	defer s.write.Unlock()
	r, err := s.Container(id)
	if err != nil {
		return Container{}, err
	}
	before := r
	if err := change(&r); err != nil {
		return Container{}, err
	}
	if err := s.put(bucketContainers, r.ID, r); err != nil {
		return Container{}, err
	}
	s.mu.Lock()
	s.containers.change(r.ID, r)
	s.mu.Unlock()
	s.containerChanged(&before, &r)
	return r, nil
}

// DeleteSandbox forgets the record and its name. Idempotent.
func (s *Store) DeleteSandbox(id string) error {
	s.write.Lock()
	defer s.write.Unlock()
	if err := s.delete(bucketSandboxes, id); err != nil {
		return err
	}
	s.mu.Lock()
	r, ok := s.sandboxes.remove(id)
	if ok {
		delete(s.names, sandboxName(r))
	}
	s.mu.Unlock()
	if ok {
		s.sandboxChanged(&r, nil)
	}
	return nil
}

// DeleteContainer is DeleteSandbox's like.
func (s *Store) DeleteContainer(id string) error {
	s.write.Lock()
	defer s.write.Unlock()
	if err := s.delete(bucketContainers, id); err != nil {
		return err
	}
	s.mu.Lock()
	r, ok := s.containers.remove(id)
	if ok {
		delete(s.names, containerName(r))
	}
	s.mu.Unlock()
	if ok {
		s.containerChanged(&r, nil)
	}
	return nil
}

// Sandbox finds a record by its ID or an unambiguous prefix of it. NotFound otherwise.
func (s *Store) Sandbox(id string) (Sandbox, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.sandboxes.find("sandbox", id)
}

// Container finds a record by its ID or an unambiguous prefix of it. NotFound otherwise.
func (s *Store) Container(id string) (Container, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.containers.find("container", id)
}

// SandboxByName finds the sandbox that holds a reserved name.
func (s *Store) SandboxByName(name string) (Sandbox, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.sandboxes.get(s.names["s/"+name])
}

// ContainerByName finds the container that holds a reserved name.
func (s *Store) ContainerByName(name string) (Container, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.containers.get(s.names["c/"+name])
}

// Sandboxes returns all records, newest first.
func (s *Store) Sandboxes() []Sandbox {
	entries := s.SandboxEntries()
	all := make([]Sandbox, len(entries))
	for i, e := range entries {
		all[i] = e.Record
	}
	return all
}

// Containers returns all records, newest first; those of one sandbox when sandboxID is not empty.
func (s *Store) Containers(sandboxID string) []Container {
	all := []Container{}
	for _, e := range s.ContainerEntries() {
		if sandboxID == "" || e.Record.SandboxID == sandboxID {
			all = append(all, e.Record)
		}
	}
	return all
}

// SandboxEntries returns all records without copying them, newest first. The slice is shared: it is read only.
func (s *Store) SandboxEntries() []*Entry[Sandbox] {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.sandboxes.newest
}

// ContainerEntries is SandboxEntries' like.
func (s *Store) ContainerEntries() []*Entry[Container] {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.containers.newest
}

func (s *Store) nameHolder(name string) (string, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	id, taken := s.names[name]
	return id, taken
}

// nextCreated gives strictly increasing times even when the clock stands still or jumps back: kubelet sorts
// sandboxes and containers by them.
func (s *Store) nextCreated() time.Time {
	s.created = max(time.Now().UnixNano(), s.created+1)
	return time.Unix(0, s.created)
}

func (s *Store) put(bucket []byte, id string, r any) error {
	value, sum, err := seal(bucket, id, r)
	if err != nil {
		return err
	}
	return s.commit(bucket, id, value, sum)
}

func (s *Store) delete(bucket []byte, id string) error { return s.commit(bucket, id, nil, 0) }

// commit changes one value, or removes it when it is nil. A file that turns out to be damaged meanwhile is replaced by
// one with what is in memory, which is all that was ever committed.
func (s *Store) commit(bucket []byte, id string, value []byte, sum uint64) error {
	if s.db == nil {
		return fmt.Errorf("record %s: the database was opened for reading: %w", id, errdefs.ErrFailedPrecondition)
	}
	key := sumKey(bucket, id)
	var digest uint64
	change := func() error {
		digest = s.digest - s.sums[key] + sum
		return s.db.Update(func(tx *bolt.Tx) error {
			root := tx.Bucket(bucketRoot)
			meta := root.Bucket(bucketMeta)
			if err := meta.Put(keyCreated, strconv.AppendInt(nil, s.created, 10)); err != nil {
				return err
			}
			if err := meta.Put(keyDigest, []byte(formatSum(digest))); err != nil {
				return err
			}
			if value == nil {
				return root.Bucket(bucket).Delete([]byte(id))
			}
			return root.Bucket(bucket).Put([]byte(id), value)
		})
	}
	err := contained(change)
	if errdefs.IsDataLoss(err) {
		slog.Error("the database is damaged; it is written anew", "path", s.path, "error", err)
		if err = s.rewrite(); err == nil { // the damaged one stays open: bbolt may hang on closing it
			err = contained(change)
		}
	}
	if err != nil {
		return fmt.Errorf("record %s: %w", id, err)
	}
	s.digest, s.sums[key] = digest, sum
	if value == nil {
		delete(s.sums, key)
	}
	return nil
}
