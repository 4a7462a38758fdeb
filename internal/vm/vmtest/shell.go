package vmtest

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"flint/internal/guest"
)

// crashScript is the shell command that makes a Linux guest panic; Fake's guests know it too.
const crashScript = "echo c >/proc/sysrq-trigger"

// shell is what a Fake's guest does for a command by default: Shell, and the crash.
func (m *machine) shell(ctx context.Context, c guest.Command, stdin io.Reader, stdout, stderr io.Writer) guest.Exit {
	if len(c.Args) == 3 && c.Args[0] == "sh" && c.Args[2] == crashScript {
		m.print("Kernel panic - not syncing: sysrq triggered crash\n")
		m.end(fmt.Errorf("%w: the guest's kernel panicked", ErrCrash))
		<-ctx.Done()
		return guest.Exit{}
	}
	return Shell(ctx, c, stdin, stdout, stderr)
}

// Shell acts out a few commands as Linux has them, without running anything: true, false, echo WORD…, cat,
// `head -c N /dev/zero`, `sleep N` (which lasts until a signal), `count N` (a number each 10 ms), and `sh -c SCRIPT` where SCRIPT is some of these and
// `exit N`, separated by semicolons or newlines, without quoting, each optionally with `>&2`. Everything else is exit 127.
func Shell(ctx context.Context, c guest.Command, stdin io.Reader, stdout, stderr io.Writer) guest.Exit {
	if len(c.Args) != 3 || c.Args[0] != "sh" || c.Args[1] != "-c" {
		code, _ := simple(ctx, c.Args, stdin, stdout, stderr)
		return guest.Exit{Code: code}
	}
	last := 0
	for _, line := range strings.FieldsFunc(c.Args[2], func(r rune) bool { return r == ';' || r == '\n' }) {
		words, to := strings.Fields(line), stdout
		if n := len(words); n > 0 && words[n-1] == ">&2" {
			words, to = words[:n-1], stderr
		}
		if len(words) == 0 {
			continue
		}
		var exits bool
		if last, exits = simple(ctx, words, stdin, to, stderr); exits || ctx.Err() != nil {
			break
		}
	}
	return guest.Exit{Code: last}
}

// simple acts out one command; exits means that the shell ends with it.
func simple(ctx context.Context, words []string, stdin io.Reader, stdout, stderr io.Writer) (code int, exits bool) {
	check := func(err error) (int, bool) {
		if err != nil {
			return 1, false
		}
		return 0, false
	}
	number := func(i int) int64 {
		if i >= len(words) {
			return 0
		}
		n, _ := strconv.ParseInt(words[i], 10, 64)
		return n
	}
	if len(words) == 0 {
		return 127, false
	}
	switch words[0] {
	case "true":
		return 0, false
	case "false":
		return 1, false
	case "exit":
		return int(number(1)), true
	case "echo":
		_, err := fmt.Fprintln(stdout, strings.Join(words[1:], " "))
		return check(err)
	case "cat":
		_, err := io.Copy(stdout, stdin)
		return check(err)
	case "head":
		_, err := io.CopyN(stdout, zeros{}, number(2))
		return check(err)
	case "count":
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for n := range number(1) {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return 1, false
			}
			if _, err := fmt.Fprintf(stdout, "count %d\n", n+1); err != nil {
				return 1, false
			}
		}
		return 0, false
	case "sleep":
		<-ctx.Done()
		return 1, false
	}
	_, _ = fmt.Fprintf(stderr, "%s: not found\n", words[0])
	return 127, false
}

// zeros is /dev/zero.
type zeros struct{}

// Read implements io.Reader.
func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
