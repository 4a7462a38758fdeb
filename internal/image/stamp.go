package image

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"flint/internal/digest"
)

// maxContext bounds the files of a build context or a drive's directory.
const maxContext = 1_000_000

var errManyFiles = fmt.Errorf("more than %d files", maxContext)

// fileStamp is a fingerprint of a file that changes when its content may have: path, inode, size and both times. It is
// settled when the file is old enough for the next change to give another time.
func fileStamp(path string) (stamp string, settled bool, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", false, fmt.Errorf("look at image: %w", err)
	}
	stamp, changed := stampOf(path, info)
	return stamp, time.Since(changed) > settleTime, nil
}

// stampOf fingerprints what Stat says. The change time cannot be set back by anyone but the clock.
func stampOf(path string, info fs.FileInfo) (stamp string, changed time.Time) {
	var inode uint64
	changed = info.ModTime()
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		inode, changed = st.Ino, time.Unix(st.Ctim.Unix())
	}
	return fmt.Sprintf("%s %d %o %d %d %d", path, inode, info.Mode(), info.Size(), info.ModTime().UnixNano(), changed.UnixNano()), changed
}

// hashFile returns the digest of a file's content, as images name it.
func hashFile(ctx context.Context, path string) (string, error) {
	sum, err := digest.File(ctx, path)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return "sha256:" + sum, nil
}

// treeStamp fingerprints every file below dir that is not ignored, as fileStamp does for one.
func treeStamp(ctx context.Context, dir string, but *ignored) (stamp string, settled bool, err error) {
	sum := sha256.New()
	var newest time.Time
	err = eachFile(ctx, dir, but.leave(func(path string, info fs.FileInfo) error {
		s, changed := stampOf(path, info)
		if changed.After(newest) {
			newest = changed
		}
		fmt.Fprintf(sum, "%d:%s,", len(s), s)
		return nil
	}))
	return hexSum(sum), time.Since(newest) > settleTime, err
}

// treeDigest is the digest of every file below dir that is not ignored: name, type, permissions and content, not owners and times.
func treeDigest(ctx context.Context, dir string, but *ignored) (string, error) {
	sum := sha256.New()
	err := eachFile(ctx, dir, but.leave(func(path string, info fs.FileInfo) error {
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		content := ""
		switch info.Mode().Type() {
		case 0:
			content, err = hashFile(ctx, path)
		case fs.ModeSymlink:
			content, err = os.Readlink(path)
		}
		if err != nil {
			return err
		}
		fmt.Fprintf(sum, "%d:%s %o %d:%s,", len(rel), rel, info.Mode(), len(content), content)
		return nil
	}))
	return hexSum(sum), err
}

// contextDigest is treeDigest, remembered by treeStamp, so that an unchanged directory is not read again.
func (s *Store) contextDigest(ctx context.Context, dir string, but *ignored) (string, error) {
	stamp, settled, err := treeStamp(ctx, dir, but)
	if err != nil {
		return "", fmt.Errorf("look at %s: %w", dir, err)
	}
	key := keyOf("tree", dir, stamp)
	var digest string
	if s.recall(key, &digest) {
		return digest, nil
	}
	if digest, err = treeDigest(ctx, dir, but); err != nil {
		return "", fmt.Errorf("read %s: %w", dir, err)
	}
	if !settled {
		return digest, nil
	}
	s.note(key, digest)
	return digest, nil
}

// eachFile calls visit for dir and everything below it, in byte order, following no symbolic links.
func eachFile(ctx context.Context, dir string, visit func(path string, info fs.FileInfo) error) error {
	n := 0
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if n++; n > maxContext {
			return errManyFiles
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed while we looked
		}
		if err != nil {
			return err
		}
		return visit(path, info)
	})
}
