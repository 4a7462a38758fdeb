package guest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

// frames decodes all of b.
func frames(t *testing.T, r io.Reader) []frame {
	t.Helper()
	d := newDecoder(r)
	var out []frame
	for {
		f, err := d.next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		f.payload = bytes.Clone(f.payload)
		out = append(out, f)
	}
}

func wire(fs ...frame) []byte {
	var b, scratch []byte
	for _, f := range fs {
		b = appendFrame(b, f, &scratch)
	}
	return b
}

// awkward are payloads that look like frames, escapes, or parts of them.
func awkward() []frame {
	inner := wire(frame{version: Version, kind: kindHello, epoch: 1, payload: []byte("inner")})
	var fs []frame
	for i, p := range [][]byte{
		nil,
		{0xF1},
		[]byte("\xF1l"), []byte("\xF1ln"), []byte("\xF1lnt"), []byte("\xF1ln\x00"), []byte("\xF1\xF1\xF1ln\xF1l"), inner,
		bytes.Repeat([]byte("\xF1ln"), 1000), bytes.Repeat([]byte{0xF1}, 100), make([]byte, maxPayload),
	} {
		fs = append(fs, frame{version: Version, kind: kindStdout, epoch: 0xF16C6E_F16C6E74, stream: 0xF16C6E74 + uint32(i), payload: p})
	}
	return fs
}

func equal(a, b frame) bool {
	return a.version == b.version && a.kind == b.kind && a.epoch == b.epoch && a.stream == b.stream && bytes.Equal(a.payload, b.payload)
}

func TestFramesRoundTrip(t *testing.T) {
	want := awkward()
	for name, r := range map[string]io.Reader{
		"whole": bytes.NewReader(wire(want...)), "byte by byte": iotest.OneByteReader(bytes.NewReader(wire(want...))),
		"halves": iotest.HalfReader(bytes.NewReader(wire(want...))),
	} {
		got := frames(t, r)
		if len(got) != len(want) {
			t.Fatalf("%s: %d frames of %d", name, len(got), len(want))
		}
		for i := range want {
			if !equal(got[i], want[i]) {
				t.Errorf("%s: frame %d came back as %+v", name, i, got[i])
			}
		}
	}
}

// A frame cut anywhere, or with a wrong byte anywhere, costs at most itself: the one after it comes through at once.
func TestTornFrameCostsOnlyItself(t *testing.T) {
	next := frame{version: Version, kind: kindPing, epoch: 7, stream: 9, payload: []byte("next")}
	for _, f := range awkward()[:8] {
		whole := wire(f)
		for cut := range len(whole) {
			got := frames(t, bytes.NewReader(append(bytes.Clone(whole[:cut]), wire(next)...)))
			if len(got) == 2 && equal(got[0], f) {
				got = got[1:] // all it lacked was what the next one begins with
			}
			if len(got) != 1 || !equal(got[0], next) {
				t.Fatalf("payload %q cut at %d: %d frames, %+v", f.payload, cut, len(got), got)
			}
		}
		for at := range whole {
			bad := bytes.Clone(whole)
			bad[at] ^= 0x10
			got := frames(t, bytes.NewReader(append(bad, wire(next)...)))
			if len(got) != 1 || !equal(got[0], next) {
				t.Fatalf("payload %q flipped at %d: %d frames, %+v", f.payload, at, len(got), got)
			}
		}
		// Cut at the front: what an earlier connection's reader left.
		for cut := 1; cut < len(whole); cut++ {
			got := frames(t, bytes.NewReader(append(bytes.Clone(whole[cut:]), wire(next)...)))
			if len(got) != 1 || !equal(got[0], next) {
				t.Fatalf("payload %q from %d on: %d frames, %+v", f.payload, cut, len(got), got)
			}
		}
	}
}

func TestGarbageBetweenFrames(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	want := awkward()
	var b []byte
	for _, f := range want {
		junk := make([]byte, rnd.IntN(3000))
		for i := range junk {
			junk[i] = "\xF1lnt\x00ab"[rnd.IntN(7)]
		}
		b = append(append(b, junk...), wire(f)...)
	}
	got := frames(t, bytes.NewReader(b))
	if len(got) != len(want) {
		t.Fatalf("%d frames of %d", len(got), len(want))
	}
	for i := range want {
		if !equal(got[i], want[i]) {
			t.Errorf("frame %d differs", i)
		}
	}
}

// A length beyond the bound must not make the decoder wait for so much, nor hold it.
func TestLengthBeyondBound(t *testing.T) {
	bad := wire(frame{version: Version, kind: kindStdout, payload: []byte("x")})
	binary.BigEndian.PutUint32(bad[4+16:], 1<<31)
	d := newDecoder(io.MultiReader(bytes.NewReader(bad), bytes.NewReader(make([]byte, 1<<20)),
		bytes.NewReader(wire(frame{version: Version, kind: kindPing}))))
	f, err := d.next()
	if err != nil || f.kind != kindPing || d.torn != 1 {
		t.Fatalf("frame %+v, error %v, %d torn", f, err, d.torn)
	}
	if cap(d.body) > 2*maxBody {
		t.Errorf("decoder holds %d bytes", cap(d.body))
	}
}

func TestReaderWithoutProgress(t *testing.T) {
	if _, err := newDecoder(stuck{}).next(); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("error %v", err)
	}
}

type stuck struct{}

func (stuck) Read([]byte) (int, error) { return 0, nil }

// FuzzDecode feeds any bytes, then a frame: the decoder must end, stay within its bounds and find that frame.
func FuzzDecode(f *testing.F) {
	for _, a := range awkward()[:9] {
		f.Add(wire(a), uint16(3))
		f.Add(wire(a)[2:], uint16(1))
	}
	next := frame{version: Version, kind: kindBye, epoch: 3, stream: 4, payload: []byte("\xF1lnt")}
	f.Fuzz(func(t *testing.T, b []byte, size uint16) {
		r := &chunked{append(bytes.Clone(b), wire(next)...), int(size) + 1}
		d := newDecoder(r)
		var last frame
		for {
			got, err := d.next()
			if err != nil {
				break
			}
			if len(got.payload) > maxPayload || cap(d.body) > 2*maxBody {
				t.Fatalf("payload of %d bytes, %d held", len(got.payload), cap(d.body))
			}
			last = got
			last.payload = bytes.Clone(got.payload)
		}
		if !equal(last, next) {
			t.Fatalf("the frame after the bytes came as %+v", last)
		}
	})
}

type chunked struct {
	b []byte
	n int
}

func (c *chunked) Read(p []byte) (int, error) {
	if len(c.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), c.n)], c.b)
	c.b = c.b[n:]
	return n, nil
}

func FuzzControl(f *testing.F) {
	for i, s := range []string{
		`{"Version":1}`, `{"Hostname":"a","MachineID":"00112233445566778899aabbccddeeff","DNS":["::1"]}`, `{"Args":["a"],"TTY":{"Cols":1}}`,
		`{"Code":1}`, `{"Steps":[{"Name":"a","Took":1}]}`, `{"Signal":"SIGTERM"}`, `null`, `[]`, `{"Version":1}{}`, `{"Load":-1}`,
	} {
		f.Add(uint8(i), []byte(s))
	}
	f.Fuzz(func(t *testing.T, which uint8, b []byte) {
		kinds := []func() bounded{
			func() bounded { return &greeting{} }, func() bounded { return &Config{} }, func() bounded { return &Command{} },
			func() bounded { return &Exit{} }, func() bounded { return &Configured{} }, func() bounded { return &signal{} },
			func() bounded { return &Hello{} }, func() bounded { return &refusal{} }, func() bounded { return &Size{} }, func() bounded { return &Stats{} },
		}
		v := kinds[int(which)%len(kinds)]()
		if len(b) > maxPayload || decodeControl(b, v) != nil {
			return
		}
		if err := v.check(); err != nil {
			t.Fatalf("%T was accepted, but %v", v, err)
		}
	})
}

func BenchmarkFrames(b *testing.B) {
	w := wire(frame{version: Version, kind: kindStdout, payload: bytes.Repeat([]byte("some output\n"), chunk/12)})
	d := newDecoder(&endless{b: w})
	b.SetBytes(int64(len(w)))
	for b.Loop() {
		if _, err := d.next(); err != nil {
			b.Fatal(err)
		}
	}
}

type endless struct {
	b  []byte
	at int
}

func (e *endless) Read(p []byte) (int, error) {
	n := copy(p, e.b[e.at:])
	e.at = (e.at + n) % len(e.b)
	return n, nil
}
