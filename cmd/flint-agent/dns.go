package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"time"
)

const (
	probeWithin = 2 * time.Second
	probeAgain  = 500 * time.Millisecond // a lost datagram is sent again
)

// probeDNS looks name up on every server, by UDP and by TCP, all at once. It returns a sentence for each that does not
// answer; that is what a job would meet.
func probeDNS(ctx context.Context, servers []netip.Addr, name string) []string {
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	type result struct {
		at  int
		err error
	}
	results := make(chan result)
	var asked []string
	for _, s := range servers {
		for _, transport := range []string{"udp", "tcp"} {
			at := len(asked)
			asked = append(asked, fmt.Sprintf("name server %s by %s", s, strings.ToUpper(transport)))
			go func() { results <- result{at, askDNS(ctx, transport, netip.AddrPortFrom(s, 53), name)} }()
		}
	}
	faults := make([]string, len(asked))
	for range asked {
		if r := <-results; r.err != nil {
			faults[r.at] = fmt.Sprintf("ask %s for %s: %v", asked[r.at], name, r.err)
		}
	}
	var out []string
	for _, f := range faults {
		if f != "" {
			out = append(out, f)
		}
	}
	return out
}

// askDNS sends one query and waits for an answer to it, whatever that says of the name.
func askDNS(ctx context.Context, transport string, server netip.AddrPort, name string) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, transport, server.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	id := uint16(rand.Uint32())
	query := dnsQuery(id, name)
	if transport == "tcp" {
		if err := conn.SetDeadline(deadline); err != nil {
			return err
		}
		answer, err := exchangeTCP(conn, query)
		if err != nil {
			return err
		}
		return checkAnswer(id, answer)
	}
	answer := make([]byte, 1232)
	for {
		next := time.Now().Add(probeAgain)
		last := !next.Before(deadline)
		if last {
			next = deadline
		}
		if err := conn.SetDeadline(next); err != nil {
			return err
		}
		if _, err := conn.Write(query); err != nil {
			return err
		}
		n, err := conn.Read(answer)
		if err == nil {
			return checkAnswer(id, answer[:n])
		}
		if last || !errors.Is(err, context.DeadlineExceeded) && !isTimeout(err) {
			return err
		}
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

func exchangeTCP(conn net.Conn, query []byte) ([]byte, error) {
	if _, err := conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)); err != nil {
		return nil, err
	}
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return nil, err
	}
	answer := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(conn, answer)
	return answer, err
}

// dnsQuery is a question for the name's IPv4 address (RFC 1035, 4.1).
func dnsQuery(id uint16, name string) []byte {
	q := binary.BigEndian.AppendUint16(nil, id)
	q = append(q, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0) // recursion desired, one question
	for label := range strings.SplitSeq(strings.Trim(name, "."), ".") {
		label = label[:min(len(label), 63)]
		q = append(q, byte(len(label)))
		q = append(q, label...)
	}
	return append(q, 0, 0, 1, 0, 1) // root, type A, class IN
}

// checkAnswer accepts any answer but a server's word that it could not, or would not, look.
func checkAnswer(id uint16, b []byte) error {
	if len(b) < 12 || binary.BigEndian.Uint16(b) != id || b[2]&0x80 == 0 {
		return errors.New("what came back is no answer to the question")
	}
	switch b[3] & 0x0f {
	case 2:
		return errors.New("the server failed (SERVFAIL)")
	case 5:
		return errors.New("the server refused (REFUSED)")
	}
	return nil
}
