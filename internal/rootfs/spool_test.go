package rootfs

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"syscall"
	"testing"
)

// TestHolesHoldWhatWasWritten compares a file with holes to one in memory, whatever is written where.
func TestHolesHoldWhatWasWritten(t *testing.T) {
	f := newFile(t, "f")
	h, random, want := &holes{f: f}, rand.New(rand.NewPCG(1, 2)), []byte(nil)
	for range 500 {
		at := random.IntN(len(want) + 3*holeBlock)
		if random.IntN(3) == 0 {
			at = at / holeBlock * holeBlock
		}
		piece := make([]byte, random.IntN(4*holeBlock))
		if random.IntN(3) == 0 {
			piece[random.IntN(len(piece)+1)/2] = 1
		}
		if _, err := h.Seek(int64(at), io.SeekStart); err != nil {
			t.Fatal(err)
		}
		if n, err := h.Write(piece); err != nil || n != len(piece) {
			t.Fatalf("wrote %d of %d: %v", n, len(piece), err)
		}
		if grown := at + len(piece); grown > len(want) {
			want = append(want, make([]byte, grown-len(want))...)
		}
		copy(want[at:], piece)
	}
	if err := h.finish(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(f.Name())
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, want %d, the same: %v; %v", len(got), len(want), bytes.Equal(got, want), err)
	}
}

func TestSpoolGivesBackWhatWasRead(t *testing.T) {
	s := testSpool(t)
	content := bytes.Repeat([]byte("x"), dropStep)
	for range 2 {
		if _, err := s.put(bytes.NewReader(content), dropStep); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.put(bytes.NewReader([]byte("short")), 6); err == nil {
		t.Error("a content shorter than its header says was accepted")
	}
	if err := s.flush(); err != nil {
		t.Fatal(err)
	}
	s.drop(dropStep)
	var st syscall.Stat_t
	if err := syscall.Fstat(int(s.f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 > dropStep+1<<20 {
		t.Errorf("%d bytes of the disk are taken after half of %d was given back", st.Blocks*512, 2*dropStep)
	}
	if got, err := io.ReadAll(s.section(dropStep, dropStep)); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the other half: %d bytes, %v", len(got), err)
	}
}
