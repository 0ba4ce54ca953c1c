package store

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

const (

	// fileLimit bounds what is read into memory; 1,000 pods take some MB.
	fileLimit = 1 << 30

	newSuffix     = ".new"
	lockSuffix    = ".lock"
	damagedSuffix = ".damaged-"
)

// lockLimit bounds waiting for another process; tests have less patience.
var lockLimit = 5 * time.Second

// contents are the records as a file holds them: JSON by bucket and ID.
type contents struct {
	schema  int
	created int64
	records map[string]map[string][]byte
	sums    map[string]uint64 // of records, as in Store
	digest  uint64
}

func noContents() *contents {
	c := &contents{schema: schemaVersion, records: map[string]map[string][]byte{}, sums: map[string]uint64{}}
	for _, name := range recordBuckets {
		c.records[string(name)] = map[string][]byte{}
	}
	return c
}

// Open reads the database at path, making it when it is missing, and writes it anew: with the schema of this crivm,
// and whole. A database that is damaged is kept beside it, as path.damaged-<time>; the records in it that are whole are
// taken over, Damage tells of the rest.
//
// FailedPrecondition when it was written by a newer crivm (it is left untouched), Unavailable when another process has
// it open for 5 s.
func Open(path string) (*Store, error) {
	s, damage, err := read(path)
	if err != nil {
		return nil, err
	}
	if damage != nil {
		kept := path + damagedSuffix + time.Now().UTC().Format("20060102T150405.000")
		if err := os.Link(path, kept); err != nil {
			return nil, errors.Join(fmt.Errorf("database %s is damaged (%w) and cannot be set aside: %w", path, damage, err), s.Close())
		}
		s.damage = fmt.Sprintf("the database was damaged and is kept as %s; %d sandboxes and %d containers could be read: %v", kept, len(s.sandboxes.newest), len(s.containers.newest), damage)
	}
	err = s.rewrite()
	if s.locks[1] != nil { // bbolt has locked its own file
		err = errors.Join(err, s.locks[1].Close())
		s.locks[1] = nil
	}
	if err != nil && damage == nil && s.found == schemaVersion { // the old one will do, as on a full disk
		slog.Warn("the database could not be written anew", "path", path, "error", err)
		err = contained(func() (err error) {
			s.db, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: lockLimit})
			return err
		})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("database %s: %w", path, err), s.Close())
	}
	return s, nil
}

// OpenReadOnly reads the database without changing it; all changes fail with FailedPrecondition. DataLoss when it is
// damaged. Other processes are kept from it until Close.
func OpenReadOnly(path string) (*Store, error) {
	s, damage, err := read(path)
	if err == nil && damage != nil {
		err = errors.Join(fmt.Errorf("database %s is damaged, which the daemon mends when it starts: %w: %w", path, damage, errdefs.ErrDataLoss), s.Close())
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// read locks and reads a database; damage is what could not be read of it.
func read(path string) (_ *Store, damage, err error) {
	s := &Store{
		path: path, sandboxes: newRecords[Sandbox](), containers: newRecords[Container](), names: map[string]string{},
	}
	if s.locks[0], err = lockFile(path+lockSuffix, os.O_CREATE); err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	found := noContents()
	s.locks[1], err = lockFile(path, 0) // bbolt's own lock, which also a crivm before schema 2 takes
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, nil, err
	default:
		if found, damage, err = readContents(s.locks[1]); err != nil {
			return nil, nil, fmt.Errorf("database %s: %w", path, err)
		}
	}
	s.found, s.created, s.sums, s.digest = found.schema, found.created, found.sums, found.digest
	if err := migrate(found); err != nil {
		return nil, nil, fmt.Errorf("database %s: %w", path, err)
	}
	return s, errors.Join(damage, s.take(found)), nil
}

// lockFile opens a file and locks it for this process alone.
func lockFile(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|flags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("database: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), lockLimit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("database %s is held by another process: %w", path, errdefs.ErrUnavailable), f.Close())
		}
	}
}

// readContents reads a file as far as it can be believed.
func readContents(f *os.File) (_ *contents, damage, err error) {
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if info.Size() > fileLimit {
		return nil, nil, fmt.Errorf("%d bytes are more than a database of crivm can have: %w", info.Size(), errdefs.ErrDataLoss)
	}
	data := make([]byte, info.Size())
	if n, err := f.ReadAt(data, 0); err != nil && n < len(data) {
		return nil, nil, err
	}
	c := noContents()
	file, damage := readBolt(data)
	root := file.in(bucketRoot)
	if root == nil {
		return c, errors.Join(damage, errors.New("it holds no records of crivm")), nil
	}
	errs := []error{damage}
	meta := root.in(bucketMeta)
	if c.schema, err = readSchema(meta); err != nil {
		if errdefs.IsFailedPrecondition(err) {
			return nil, nil, err
		}
		errs, c.schema = append(errs, err), schemaVersion
	}
	if v := meta.value(keyCreated); v != nil {
		if c.created, err = strconv.ParseInt(string(v), 10, 64); err != nil {
			errs = append(errs, fmt.Errorf("last creation time: %w", err))
		}
	}
	for _, name := range recordBuckets {
		b := root.in(name)
		if b == nil {
			if c.schema == schemaVersion {
				errs = append(errs, fmt.Errorf("%s are missing", name))
			}
			continue
		}
		for id, v := range b.values {
			text, sum, err := unseal(c.schema, name, id, v)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			c.records[string(name)][id], c.sums[sumKey(name, id)] = text, sum
			c.digest += sum
		}
	}
	if want := string(meta.value(keyDigest)); c.schema > 1 && want != formatSum(c.digest) {
		errs = append(errs, errors.New("the records together are not those that were last written"))
	}
	return c, errors.Join(errs...), nil
}

// readSchema is which schema the file has. FailedPrecondition for one that a newer crivm wrote.
func readSchema(meta *bucket) (int, error) {
	text, sum := meta.value(keySchema), meta.value(keySchemaSum)
	schema, err := strconv.Atoi(string(text))
	if err != nil || schema < 1 || (schema > 1 || sum != nil) && string(sum) != formatSum(recordSum(bucketMeta, string(keySchema), text)) {
		return 0, fmt.Errorf("schema %q is damaged", text)
	}
	if schema > schemaVersion {
		return 0, fmt.Errorf("schema %d is not known to this version of crivm (it knows %d): %w", schema, schemaVersion, errdefs.ErrFailedPrecondition)
	}
	return schema, nil
}

// recordSum tells a record that was written from all that a torn or flipped one can be.
func recordSum(bucket []byte, id string, text []byte) uint64 {
	h := sha256.New()
	fmt.Fprintf(h, "%s/%s\n", bucket, id)
	h.Write(text)
	return binary.BigEndian.Uint64(h.Sum(nil))
}

func formatSum(sum uint64) string { return fmt.Sprintf("%016x", sum) }

const sumBytes = 16

// unseal takes a record out of its value: behind its sum, but for schema 1, which had none.
func unseal(schema int, bucket []byte, id string, value []byte) (text []byte, sum uint64, err error) {
	if schema == 1 {
		if !json.Valid(value) {
			return nil, 0, fmt.Errorf("%s/%s is damaged", bucket, id)
		}
		return value, 0, nil
	}
	if len(value) <= sumBytes {
		return nil, 0, fmt.Errorf("%s/%s is cut off", bucket, id)
	}
	text = value[sumBytes+1:]
	sum = recordSum(bucket, id, text)
	if want, err := hex.DecodeString(string(value[:sumBytes])); err != nil || binary.BigEndian.Uint64(want) != sum {
		return nil, 0, fmt.Errorf("%s/%s is damaged", bucket, id)
	}
	return text, sum, nil
}

// take makes records of contents; it goes on behind what cannot be understood.
func (s *Store) take(c *contents) error {
	var errs []error
	for id, text := range c.records[string(bucketSandboxes)] {
		var r Sandbox
		if err := json.Unmarshal(text, &r); err != nil || r.ID != id || r.Config.PodSandboxConfig == nil {
			errs = append(errs, fmt.Errorf("sandbox %s cannot be understood (%w)", id, err))
			continue
		}
		s.sandboxes.add(id, r)
		s.names[sandboxName(r)] = id
		s.created = max(s.created, r.CreatedAt.UnixNano())
	}
	for id, text := range c.records[string(bucketContainers)] {
		var r Container
		if err := json.Unmarshal(text, &r); err != nil || r.ID != id || r.Config.ContainerConfig == nil {
			errs = append(errs, fmt.Errorf("container %s cannot be understood (%w)", id, err))
			continue
		}
		s.containers.add(id, r)
		s.names[containerName(r)] = id
		s.created = max(s.created, r.CreatedAt.UnixNano())
	}
	return errors.Join(errs...)
}

// rewrite replaces the file by a new one with the records in memory, in one step, and opens it. s.write is held, or
// nobody else knows s yet.
func (s *Store) rewrite() (retErr error) {
	path := s.path + newSuffix
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) { // of a daemon that died right here
		return err
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: lockLimit})
	if err != nil {
		return err
	}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, db.Close())
			_ = os.Remove(path)
		}
	}()
	sums, digest := map[string]uint64{}, uint64(0)
	err = db.Update(func(tx *bolt.Tx) error {
		root, err := tx.CreateBucket(bucketRoot)
		if err != nil {
			return err
		}
		for _, name := range append([][]byte{bucketMeta}, recordBuckets...) {
			if _, err := root.CreateBucket(name); err != nil {
				return err
			}
		}
		put := func(bucket []byte, id string, r any) error {
			value, sum, err := seal(bucket, id, r)
			if err != nil {
				return err
			}
			sums[sumKey(bucket, id)] = sum
			digest += sum
			return root.Bucket(bucket).Put([]byte(id), value)
		}
		for _, e := range s.sandboxes.newest {
			if err := put(bucketSandboxes, e.Record.ID, e.Record); err != nil {
				return err
			}
		}
		for _, e := range s.containers.newest {
			if err := put(bucketContainers, e.Record.ID, e.Record); err != nil {
				return err
			}
		}
		meta, schema := root.Bucket(bucketMeta), strconv.Itoa(schemaVersion)
		for key, value := range map[string]string{
			string(keySchema): schema, string(keySchemaSum): formatSum(recordSum(bucketMeta, string(keySchema), []byte(schema))),
			string(keyCreated): strconv.FormatInt(s.created, 10), string(keyDigest): formatSum(digest),
		} {
			if err := meta.Put([]byte(key), []byte(value)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := os.Rename(path, s.path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(s.path))
	if err != nil {
		return err
	}
	if err := errors.Join(dir.Sync(), dir.Close()); err != nil {
		return err
	}
	s.db, s.sums, s.digest = db, sums, digest
	return nil
}

// seal makes the value of a record.
func seal(bucket []byte, id string, r any) (value []byte, sum uint64, err error) {
	text, err := json.Marshal(r)
	if err != nil {
		return nil, 0, fmt.Errorf("record %s: %w", id, err)
	}
	sum = recordSum(bucket, id, text)
	return append([]byte(formatSum(sum)+" "), text...), sum, nil
}

func sumKey(bucket []byte, id string) string { return string(bucket) + "/" + id }

// contained makes an error of what bbolt does with a file that is damaged under it: DataLoss.
func contained(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("reading the file: %v: %w", r, errdefs.ErrDataLoss)
		}
	}()
	return f()
}
