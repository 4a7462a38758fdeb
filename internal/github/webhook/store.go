package webhook

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"flint"
	"flint/internal/durable"
)

const (
	// batchDelay is how long a write waits for others to share its fsync.
	batchDelay = 2 * time.Millisecond
	// lockTimeout is how long we wait for another process that has the database.
	lockTimeout = time.Second
	// chunk bounds one transaction, and with it how long a webhook waits behind it.
	chunk = 1000
)

const fileName = "webhooks.db"

// The buckets. Deliveries are in the order of their arrival, so that writing one touches few pages.
const (
	bucketJobs       = "jobs"       // place, 0, id → revision, checksum, record
	bucketDeliveries = "deliveries" // number → unix time, GUID
	bucketSweeps     = "sweeps"     // account → unix time up to which lost webhooks were looked for
)

// recordHeader is the length of a job's revision and checksum.
const recordHeader = 12

// store keeps the ledger on disk. When a write returns nil it survives a power cut.
type store struct{ db *bbolt.DB }

// arrival is one delivery that was taken.
type arrival struct {
	seq  uint64
	at   time.Time
	guid string
}

// contents is all that a store holds.
type contents struct {
	jobs     []*job
	arrivals []arrival // oldest first
	sweeps   map[string]time.Time
}

// openStore reads the database and makes it anew: that gives free pages back, and no damage that reading did not meet stays.
// A damaged one is set aside.
func openStore(dir string, keep func(*contents), log *slog.Logger) (*store, *contents, error) {
	path := filepath.Join(dir, fileName)
	c, err := readStore(path)
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, nil, &flint.Fault{
			Code: "webhook.state", What: "open the ledger of webhooks", Kind: flint.ErrConflict,
			Err: errors.New("another process has " + path), Fix: "stop the other flint, or give this one a state directory of its own",
		}
	case errors.Is(err, fs.ErrPermission):
		return nil, nil, stateFault(err)
	case err != nil:
		aside := path + ".damaged"
		log.Warn("the ledger of webhooks is damaged; set it aside, jobs are found again by asking GitHub", "file", aside, "error", err)
		if err := os.Rename(path, aside); err != nil {
			return nil, nil, stateFault(err)
		}
		c = &contents{sweeps: map[string]time.Time{}}
	}
	keep(c)
	s, err := writeStore(path, c)
	if err != nil {
		return nil, nil, stateFault(err)
	}
	return s, c, nil
}

func stateFault(err error) error {
	return &flint.Fault{
		Code: "webhook.state", What: "write the ledger of webhooks", Err: err,
		Fix: "make room, or mend the permissions of the state directory",
	}
}

// readStore reads everything. What checkFile lets pass and still makes the library panic, or fault where the file is mapped, is
// an error here, too.
func readStore(path string) (c *contents, err error) {
	c = &contents{sweeps: map[string]time.Time{}}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err := checkFile(path); err != nil {
		return nil, err
	}
	var file *os.File
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			file.Close()
			c, err = nil, fmt.Errorf("read database: %v", p)
		}
	}()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{
		ReadOnly: true, Timeout: lockTimeout,
		OpenFile: func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
			file, err = os.OpenFile(name, flag, mode)
			return file, err
		},
	})
	if err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	defer db.Close()
	if err := db.View(c.read); err != nil {
		return nil, fmt.Errorf("read database: %w", err)
	}
	return c, nil
}

func (c *contents) read(tx *bbolt.Tx) error {
	each := func(bucket string, f func(k, v []byte) error) error {
		b := tx.Bucket([]byte(bucket))
		if b == nil {
			return fmt.Errorf("there is no bucket %s", bucket)
		}
		return b.ForEach(f)
	}
	return errors.Join(
		each(bucketJobs, func(_, v []byte) error {
			j, err := decodeJob(v)
			if err == nil {
				c.jobs = append(c.jobs, j)
			}
			return err
		}),
		each(bucketDeliveries, func(_, v []byte) error {
			if len(v) < 8 {
				return errors.New("a delivery is too short")
			}
			c.arrivals = append(c.arrivals, arrival{at: decodeTime(v), guid: string(v[8:])})
			return nil
		}),
		each(bucketSweeps, func(k, v []byte) error {
			if len(v) < 8 {
				return errors.New("a sweep is too short")
			}
			c.sweeps[string(k[1:])] = decodeTime(v)
			return nil
		}),
	)
}

// writeStore makes a database with these contents at path, in the place of any other.
func writeStore(path string, c *contents) (_ *store, err error) {
	next := path + ".new"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	db, err := bbolt.Open(next, 0o600, &bbolt.Options{Timeout: lockTimeout, FreelistType: bbolt.FreelistMapType, NoStatistics: true})
	if err != nil {
		return nil, fmt.Errorf("make database: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, db.Close())
		}
	}()
	db.MaxBatchDelay = batchDelay
	if err := db.Update(c.write); err != nil {
		return nil, fmt.Errorf("fill database: %w", err)
	}
	if err := os.Rename(next, path); err != nil {
		return nil, err
	}
	return &store{db: db}, durable.SyncDir(filepath.Dir(path))
}

func (c *contents) write(tx *bbolt.Tx) error {
	for _, name := range []string{bucketJobs, bucketDeliveries, bucketSweeps} {
		if _, err := tx.CreateBucket([]byte(name)); err != nil {
			return err
		}
	}
	for _, j := range c.jobs {
		if err := putJob(tx, j); err != nil {
			return err
		}
	}
	for i := range c.arrivals {
		a := &c.arrivals[i]
		if err := putArrival(tx, a); err != nil {
			return err
		}
	}
	for account, at := range c.sweeps {
		if err := tx.Bucket([]byte(bucketSweeps)).Put(sweepKey(account), encodeTime(at)); err != nil {
			return err
		}
	}
	return nil
}

// change is one alteration of a job.
type change struct {
	key jobKey
	// apply gets the record as it is (nil: none) and returns what it becomes: the same one to leave it, nil to delete it. It may
	// be called more than once and must not alter what it gets.
	apply func(*job) *job
	from  *job   // what apply got
	to    *job   // what it returned
	seen  uint64 // the newest revision at that moment
}

// update applies changes and notes an arrival (nil: none came with them), all or nothing. Concurrent calls share their fsyncs.
func (s *store) update(changes []change, a *arrival) error {
	err := s.db.Batch(func(tx *bbolt.Tx) error {
		for i := range changes {
			if err := changes[i].run(tx); err != nil {
				return err
			}
		}
		if a != nil {
			return putArrival(tx, a)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("write ledger of webhooks: %w", err)
	}
	return nil
}

func (c *change) run(tx *bbolt.Tx) error {
	c.from, c.to = nil, nil
	key, jobs := encodeKey(c.key), tx.Bucket([]byte(bucketJobs))
	if v := jobs.Get(key); v != nil {
		c.from, _ = decodeJob(v) // one that was damaged since the start begins anew
	}
	c.to, c.seen = c.apply(c.from), jobs.Sequence()
	switch {
	case c.to == c.from:
		return nil
	case c.to == nil:
		return jobs.Delete(key)
	}
	return putJob(tx, c.to)
}

// forget deletes arrivals up to and including seq.
func (s *store) forget(seq uint64) error {
	err := s.db.Batch(func(tx *bbolt.Tx) error {
		c := tx.Bucket([]byte(bucketDeliveries)).Cursor()
		for k, _ := c.First(); len(k) == 8 && binary.BigEndian.Uint64(k) <= seq; k, _ = c.First() {
			if err := c.Delete(); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("forget old webhooks: %w", err)
	}
	return nil
}

// swept notes up to when an account's lost webhooks were looked for.
func (s *store) swept(account string, at time.Time) error {
	err := s.db.Batch(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte(bucketSweeps)).Put(sweepKey(account), encodeTime(at))
	})
	if err != nil {
		return fmt.Errorf("note sweep: %w", err)
	}
	return nil
}

func putJob(tx *bbolt.Tx, j *job) error {
	b := tx.Bucket([]byte(bucketJobs))
	rev, err := b.NextSequence()
	if err != nil {
		return err
	}
	text, err := json.Marshal(j)
	if err != nil {
		return err
	}
	j.rev = rev
	v := binary.BigEndian.AppendUint64(make([]byte, 0, recordHeader+len(text)), rev)
	v = binary.BigEndian.AppendUint32(v, crc32.ChecksumIEEE(text))
	return b.Put(encodeKey(j.key()), append(v, text...))
}

func putArrival(tx *bbolt.Tx, a *arrival) error {
	b := tx.Bucket([]byte(bucketDeliveries))
	seq, err := b.NextSequence()
	if err != nil {
		return err
	}
	a.seq = seq
	b.FillPercent = 0.95 // they are appended
	return b.Put(binary.BigEndian.AppendUint64(nil, seq), append(encodeTime(a.at), a.guid...))
}

func encodeKey(k jobKey) []byte {
	return binary.BigEndian.AppendUint64(append([]byte(k.place), 0), uint64(k.id))
}

func decodeJob(v []byte) (*job, error) {
	if len(v) < recordHeader || crc32.ChecksumIEEE(v[recordHeader:]) != binary.BigEndian.Uint32(v[8:]) {
		return nil, errors.New("a job's checksum is wrong")
	}
	j := &job{rev: binary.BigEndian.Uint64(v)}
	if err := json.Unmarshal(v[recordHeader:], j); err != nil {
		return nil, fmt.Errorf("read job: %w", err)
	}
	if j.State < waiting || j.State > completed {
		return nil, fmt.Errorf("read job %d: its state is %d", j.ID, int(j.State))
	}
	return j, nil
}

func encodeTime(t time.Time) []byte { return binary.BigEndian.AppendUint64(nil, uint64(t.Unix())) }

func decodeTime(v []byte) time.Time { return time.Unix(int64(binary.BigEndian.Uint64(v)), 0) }

// sweepKey is never empty, as the name of an account may be.
func sweepKey(account string) []byte { return []byte("@" + account) }
