package guest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
)

// A frame on the wire is the magic, then the escaped body: a header and a payload. The escaping keeps the magic out of
// every body, so a magic always begins a frame: after garbage or a torn frame the reader is in step again at the very
// next one, whatever a payload contains.
//
//	body:  version u8, kind u8, zero u16, epoch u64, stream u32, length u32, crc32c u32, payload   (big endian)
//
// The checksum covers the body with the checksum's own bytes taken as zero. This layout is the same in every version
// of the protocol, so that halves of different versions can at least tell each other so.
const (
	headerLen  = 24
	crcAt      = 20
	maxPayload = 64 << 10 // bytes; what one frame may carry
	maxBody    = headerLen + maxPayload
)

// The magic is escPrefix and magicEnd. In a body, escPrefix is followed by escLiteral. No byte of escPrefix but the
// first equals 0xF1, so a mismatch never hides the start of another match.
const (
	magicFirst = 0xF1
	magicEnd   = 't'
	escLiteral = 0
)

const escPrefix = "\xF1ln"

type kind uint8

const (
	kindGreet     kind = 1 + iota // host: JSON greeting; its epoch is the session's from here on
	kindHello                     // agent: JSON Hello; with epoch 0 unasked, when its channel opened
	kindConfigure                 // host: JSON Config; the stream number is the call's
	kindStats                     // host
	kindReboot                    // host
	kindResult                    // agent: JSON answer to a call, of the type the call implies
	kindRefused                   // agent: JSON refusal of a call
	kindStart                     // host: JSON Command; the stream number is the process's from here on
	kindResume                    // host: takes over the process an earlier session started
	kindSignal                    // host: JSON signal
	kindResize                    // host: JSON Size
	kindForget                    // host: has all of the process's output and its exit
	kindExit                      // agent: JSON Exit; after the ends of its outputs
	kindStdin                     // host: position u64, bytes; none: the end
	kindStdout                    // agent: likewise
	kindStderr                    // agent: likewise
	kindAck                       // position u64, kind u8: everything before the position was consumed
	kindPing                      // either: sign of life; the stream number counts up
	kindPong                      // answers a ping, so that each half hears the other as often as it asks
	kindBye                       // host: the session is over; agent: likewise, JSON refusal, for want of another way to hang up
)

type frame struct {
	version uint8
	kind    kind
	epoch   uint64
	stream  uint32
	payload []byte
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// appendFrame appends f's wire form to dst. scratch is reused for the body.
func appendFrame(dst []byte, f frame, scratch *[]byte) []byte {
	b := append((*scratch)[:0], f.version, uint8(f.kind), 0, 0)
	b = binary.BigEndian.AppendUint64(b, f.epoch)
	b = binary.BigEndian.AppendUint32(b, f.stream)
	b = binary.BigEndian.AppendUint32(b, uint32(len(f.payload)))
	b = append(b, 0, 0, 0, 0)
	b = append(b, f.payload...)
	binary.BigEndian.PutUint32(b[crcAt:], crc32.Checksum(b, castagnoli))
	*scratch = b

	dst = append(dst, escPrefix...)
	dst = append(dst, magicEnd)
	for {
		i := bytes.Index(b, []byte(escPrefix))
		if i < 0 {
			return append(dst, b...)
		}
		dst = append(dst, b[:i+len(escPrefix)]...)
		dst = append(dst, escLiteral)
		b = b[i+len(escPrefix):]
	}
}

// decoder reads frames from a byte stream that may begin anywhere and have holes. It holds at most one frame.
type decoder struct {
	r       io.Reader
	in      []byte // what was read and not looked at yet
	inBuf   []byte
	body    []byte // of the frame being read, unescaped
	inFrame bool
	matched int   // how much of escPrefix the last bytes were; not in body yet
	torn    int64 // frames given up
	empty   int   // reads in a row that gave nothing
}

const readLen = 32 << 10

func newDecoder(r io.Reader) *decoder { return &decoder{r: r, inBuf: make([]byte, readLen)} }

// next returns the next whole frame. Its payload is valid until the call after. The only errors are the reader's.
func (d *decoder) next() (frame, error) {
	for {
		for len(d.in) > 0 {
			if f, ok := d.step(); ok {
				return f, nil
			}
		}
		n, err := d.r.Read(d.inBuf)
		d.in = d.inBuf[:n]
		if n > 0 {
			d.empty = 0
			continue
		}
		if err != nil {
			return frame{}, err
		}
		if d.empty++; d.empty > 100 {
			return frame{}, io.ErrNoProgress
		}
	}
}

// step consumes at least one byte of in.
func (d *decoder) step() (frame, bool) {
	if d.matched == 0 {
		i := bytes.IndexByte(d.in, magicFirst)
		if i < 0 {
			i = len(d.in)
		}
		if !d.inFrame {
			d.in = d.in[i:]
		} else if i > 0 {
			i = min(i, d.missing())
			d.body = append(d.body, d.in[:i]...)
			d.in = d.in[i:]
			return d.complete()
		}
		if len(d.in) == 0 {
			return frame{}, false
		}
	}
	c := d.in[0]
	d.in = d.in[1:]
	return d.match(c)
}

// match looks at a byte that continues, or might begin, a magic or an escape.
func (d *decoder) match(c byte) (frame, bool) {
	switch {
	case d.matched == len(escPrefix) && c == magicEnd:
		d.tear() // a frame begins, so the one before is over
		d.inFrame, d.matched, d.body = true, 0, d.body[:0]
		return frame{}, false
	case d.matched == len(escPrefix) && c == escLiteral:
		d.matched = 0
		d.literal(escPrefix)
	case d.matched == len(escPrefix):
		d.tear() // no encoder writes that
		d.matched = 0
		if c == magicFirst {
			d.matched = 1
		}
		return frame{}, false
	case c == escPrefix[d.matched]:
		d.matched++
	default:
		d.literal(escPrefix[:d.matched])
		d.matched = 0
		if c == magicFirst {
			d.matched = 1
		} else if d.inFrame {
			d.body = append(d.body, c)
		}
	}
	return d.complete()
}

func (d *decoder) literal(s string) {
	if d.inFrame {
		d.body = append(d.body, s...)
	}
}

// missing says how many bytes the body surely lacks; at least 1 while in a frame.
func (d *decoder) missing() int {
	if len(d.body) < headerLen {
		return headerLen - len(d.body)
	}
	return max(1, headerLen+d.length()-len(d.body))
}

func (d *decoder) length() int {
	return int(min(binary.BigEndian.Uint32(d.body[16:]), maxPayload+1))
}

// complete returns the frame if its body is all there.
func (d *decoder) complete() (frame, bool) {
	if !d.inFrame {
		return frame{}, false
	}
	// A body may end with the beginning of escPrefix. All of it would be followed by an escape.
	tail := 0
	if d.matched < len(escPrefix) {
		tail = d.matched
	}
	if len(d.body)+tail < headerLen {
		return frame{}, false
	}
	mark := len(d.body)
	d.body = append(d.body, escPrefix[:tail]...)
	if n := d.length(); n > maxPayload || len(d.body) > headerLen+n {
		d.tear()
		return frame{}, false
	} else if len(d.body) < headerLen+n {
		d.body = d.body[:mark]
		return frame{}, false
	}
	want := binary.BigEndian.Uint32(d.body[crcAt:])
	clear(d.body[crcAt:headerLen])
	if crc32.Checksum(d.body, castagnoli) != want {
		d.tear()
		return frame{}, false
	}
	d.inFrame = false // what matched of a magic may be the next frame's, if this one lacked just that
	return frame{
		version: d.body[0],
		kind:    kind(d.body[1]),
		epoch:   binary.BigEndian.Uint64(d.body[4:]),
		stream:  binary.BigEndian.Uint32(d.body[12:]),
		payload: d.body[headerLen:],
	}, true
}

func (d *decoder) tear() {
	if d.inFrame {
		d.torn++
	}
	d.inFrame = false
}

// position splits a data or ack payload into its position and the rest.
func position(p []byte) (int64, []byte, error) {
	if len(p) < 8 || p[0] > 0x7f {
		return 0, nil, errors.New("position is missing or out of range")
	}
	return int64(binary.BigEndian.Uint64(p)), p[8:], nil
}
