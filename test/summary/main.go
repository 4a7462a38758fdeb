// Command summary reads `go test -json` on standard input and shows people what they need of it: each package's verdict,
// the output of what failed, and at the end the slowest tests, every skipped one with its reason, and the counts.
//
// It exits 1 when anything failed or nothing ran. It must not run tests itself.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// event is a line of `go test -json` (see `go doc test2json`).
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

type key struct{ pkg, test string }

type summary struct {
	out                     io.Writer
	output                  map[key][]string
	passed, failed, skipped int
	skips                   []string
	failedIn                map[string]bool // packages with a failed test
	times                   []timed
}

// timed is how long a test took, its parts included.
type timed struct {
	key
	seconds float64
}

const (
	slowestShown = 20
	slowSeconds  = 5 // what is faster is never shown
)

func main() {
	s := summary{out: os.Stdout, output: map[key][]string{}, failedIn: map[string]bool{}}
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			fmt.Println(lines.Text()) // not of go test: a build's complaint, say
			continue
		}
		s.take(e)
	}
	if err := lines.Err(); err != nil {
		fmt.Fprintln(os.Stderr, "summary:", err)
		os.Exit(1)
	}
	os.Exit(s.end())
}

func (s *summary) take(e event) {
	k := key{e.Package, e.Test}
	switch e.Action {
	case "output", "build-output":
		s.output[k] = append(s.output[k], e.Output)
	case "pass", "fail", "skip":
		s.verdict(k, e)
	case "build-fail":
		fmt.Fprint(s.out, strings.Join(s.output[k], "")) // its package's failure is counted
	}
}

func (s *summary) verdict(k key, e event) {
	output := s.output[k]
	delete(s.output, k)
	if k.test == "" {
		if e.Action == "fail" && !s.failedIn[k.pkg] {
			s.failed++ // it did not come to a test's verdict: a panic, or a way out of the process
		}
		word := map[string]string{"pass": "ok  ", "fail": "FAIL", "skip": "none"}[e.Action]
		fmt.Fprintf(s.out, "%s  %-40s %6.1f s\n", word, k.pkg, e.Elapsed)
		if e.Action == "fail" {
			fmt.Fprint(s.out, strings.Join(output, ""))
		}
		return
	}
	if !strings.Contains(k.test, "/") && e.Elapsed >= slowSeconds {
		s.times = append(s.times, timed{k, e.Elapsed})
	}
	switch e.Action {
	case "pass":
		s.passed++
	case "fail":
		s.failed++
		s.failedIn[k.pkg] = true
		fmt.Fprintf(s.out, "\n--- %s %s\n%s\n", k.pkg, k.test, strings.Join(output, ""))
	case "skip":
		s.skipped++
		s.skips = append(s.skips, fmt.Sprintf("%s %s: %s", k.pkg, k.test, reason(output)))
	}
}

// reason is what the test said when it skipped itself: the lines that are not go test's own.
func reason(output []string) string {
	var said []string
	for _, line := range output {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "===") || strings.HasPrefix(line, "---") {
			continue
		}
		// file_test.go:12: the reason
		if _, text, ok := strings.Cut(line, "_test.go:"); ok {
			if _, text, ok = strings.Cut(text, ": "); ok {
				line = text
			}
		}
		said = append(said, line)
	}
	return strings.Join(said, " ")
}

func (s *summary) end() int {
	slices.SortFunc(s.times, func(a, b timed) int { return cmp.Compare(b.seconds, a.seconds) })
	if len(s.times) > 0 {
		fmt.Fprintf(s.out, "\nslowest:\n")
	}
	for _, t := range s.times[:min(len(s.times), slowestShown)] {
		fmt.Fprintf(s.out, "  %6.1f s  %s %s\n", t.seconds, t.pkg, t.test)
	}
	if len(s.skips) > 0 {
		fmt.Fprintf(s.out, "\nskipped, and why:\n")
		for _, skip := range s.skips {
			fmt.Fprintln(s.out, "  "+skip)
		}
	}
	fmt.Fprintf(s.out, "\n%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
	if s.failed > 0 || s.passed == 0 {
		return 1
	}
	return 0
}
