package image

import (
	"bytes"
	"compress/gzip"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// TestHolesHoldWhatWasWritten compares a file with holes to one in memory, whatever is written where.
func TestHolesHoldWhatWasWritten(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h, random, want := &holes{f: &guard{File: f}}, rand.New(rand.NewPCG(1, 2)), []byte(nil)
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
	defer s.close()
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

func TestDecompress(t *testing.T) {
	plain := bytes.Repeat([]byte("layer "), 100_000)
	zipped, squeezed := new(bytes.Buffer), new(bytes.Buffer)
	z := gzip.NewWriter(zipped)
	z.Write(plain[:1000])
	z.Close()
	z.Reset(zipped) // a second member: what pigz and estargz write
	z.Write(plain[1000:])
	z.Close()
	s, err := zstd.NewWriter(squeezed)
	if err != nil {
		t.Fatal(err)
	}
	s.Write(plain)
	s.Close()
	for name, c := range map[string]struct {
		in   []byte
		want []byte // nil: refused
	}{
		"gzip in two members": {zipped.Bytes(), plain},
		"zstd":                {squeezed.Bytes(), plain},
		"plain":               {plain, plain},
		"nothing":             {[]byte{}, []byte{}},
		"cut gzip":            {zipped.Bytes()[:zipped.Len()-1], nil},
		"cut zstd":            {squeezed.Bytes()[:squeezed.Len()/2], nil},
		"too wide a window":   {wideFrame(), nil},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := decompress(bytes.NewReader(c.in))
			var got []byte
			if err == nil {
				got, err = io.ReadAll(r)
				r.Close()
			}
			if c.want == nil {
				if err == nil {
					t.Errorf("accepted: %d bytes", len(got))
				}
				return
			}
			if err != nil || !bytes.Equal(got, c.want) {
				t.Errorf("%d bytes, want %d; %v", len(got), len(c.want), err)
			}
		})
	}
}

// wideFrame is the head of a frame that asks for a larger window than is allowed; see RFC 8878, 3.1.1.1.2.
func wideFrame() []byte {
	const exponent = 29 - 10 // 512 MiB
	return []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, exponent << 3, 0x01, 0x00, 0x00}
}
