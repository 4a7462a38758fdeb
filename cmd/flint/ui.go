package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/term"

	"flint"
	"flint/internal/app"
)

// style colours what goes to a terminal, unless NO_COLOR (no-color.org) is set.
type style struct {
	w     io.Writer
	tty   bool
	color bool
	width int
}

func styleOf(w io.Writer) style {
	s := style{w: w, width: 100}
	if g, guarded := w.(*guard); guarded {
		w = g.Writer
	}
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return s
	}
	s.tty, s.color = true, os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
	if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 20 {
		s.width = w
	}
	return s
}

// guard tells when nobody reads what is written any more.
type guard struct {
	io.Writer
	broken func()
}

func (g *guard) Write(p []byte) (int, error) {
	n, err := g.Writer.Write(p)
	if err != nil {
		g.broken()
	}
	return n, err
}

// The few colours used, as SGR parameters.
const (
	bold   = "1"
	dim    = "2"
	red    = "31"
	green  = "32"
	yellow = "33"
	cyan   = "36"
)

func (s style) paint(sgr, text string) string {
	if !s.color || text == "" {
		return text
	}
	return "\x1b[" + sgr + "m" + text + "\x1b[0m"
}

// complain shows each error as what, why and how to mend it.
func complain(w io.Writer, err error) {
	for _, e := range parts(err) {
		complainOne(w, e)
	}
}

func complainOne(w io.Writer, err error) {
	s := styleOf(w)
	var fault *flint.Fault
	if !errors.As(err, &fault) {
		fmt.Fprintf(w, "%s %s\n", s.paint(red, "flint:"), printable(err.Error()))
		return
	}
	fmt.Fprintf(w, "%s %s\n", s.paint(red, "flint: cannot "+printable(fault.What)), s.paint(dim, "["+fault.Code+"]"))
	why := ""
	if fault.Err != nil {
		why = fault.Err.Error()
	}
	if outer := strings.TrimSuffix(err.Error(), fault.Error()); outer != err.Error() && outer != "" {
		why = strings.TrimSuffix(strings.TrimSpace(outer), ":") + ": " + why
	}
	for i, line := range strings.Split(printable(why), "\n") {
		label := "       "
		if i == 0 {
			label = "  why: "
		}
		if line != "" {
			fmt.Fprintf(w, "%s%s\n", label, line)
		}
	}
	if fault.Fix != "" {
		fmt.Fprintf(w, "  fix: %s\n", s.paint(bold, fault.Fix))
	}
	if console := app.ConsoleOf(err); len(console) > 0 {
		fmt.Fprintf(w, "  end of the guest's console:\n%s", indent(console, 20))
	}
}

// indent shows the last lines of untrusted output, without what would move a terminal's cursor.
func indent(b []byte, lines int) string {
	all := strings.Split(strings.TrimRight(printable(string(b)), "\n"), "\n")
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return "    | " + strings.Join(all, "\n    | ") + "\n"
}

// printable drops control characters other than newline and tab.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || r >= 0x20 && r != 0x7f && (r < 0x80 || r > 0x9f) {
			return r
		}
		return -1
	}, strings.ToValidUTF8(s, "\uFFFD"))
}

// steps shows the milestones of long work: a line for each step that ended and, on a terminal, one that changes for
// what is under way.
type steps struct {
	style
	brief  bool // only what is under way is shown
	mu     sync.Mutex
	active []string
	shown  bool // a line without its newline is on the terminal
	last   time.Time
}

func newSteps(w io.Writer) *steps { return &steps{style: styleOf(w)} }

func (s *steps) report(m flint.Milestone) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m.Step = fromHere(m.Step)
	switch {
	case m.Line != "":
		s.current(m.Line)
	case !m.Done:
		s.active = append(s.active, m.Step)
		s.last = time.Time{}
		s.current("")
	default:
		s.clear()
		for i, a := range s.active {
			if a == m.Step {
				s.active = append(s.active[:i], s.active[i+1:]...)
				break
			}
		}
		s.line(m)
	}
}

// fromHere shortens paths below the working directory to what a person would type.
func fromHere(text string) string {
	if dir, err := os.Getwd(); err == nil && dir != "/" {
		return strings.ReplaceAll(text, " "+dir+"/", " ") // at the beginning of a word: another path may have it in the middle
	}
	return text
}

func (s *steps) line(m flint.Milestone) {
	if s.brief {
		return
	}
	mark := s.paint(green, "✓")
	if m.Err != nil {
		mark = s.paint(red, "✗")
	}
	step := strings.Repeat("  ", len(s.active)) + m.Step
	fmt.Fprintf(s.w, "  %s %s %s %s\n", mark, fit(step, 36), fit(m.Detail, 46), s.paint(dim, fmt.Sprintf("%8s", took(m.Took))))
}

// current redraws the changing line, at most ten times a second.
func (s *steps) current(line string) {
	if !s.tty || len(s.active) == 0 || time.Since(s.last) < 100*time.Millisecond {
		return
	}
	s.last = time.Now()
	text := "  … " + s.active[len(s.active)-1]
	if line = strings.ReplaceAll(printable(line), "\t", " "); line != "" {
		text += "  " + strings.TrimSpace(line)
	}
	if utf8.RuneCountInString(text) > s.width-1 {
		text = string([]rune(text)[:s.width-2]) + "…"
	}
	s.clear()
	fmt.Fprint(s.w, s.paint(dim, text))
	s.shown = true
}

func (s *steps) clear() {
	if s.shown {
		fmt.Fprint(s.w, "\r\x1b[K")
		s.shown = false
	}
}

func took(d time.Duration) string {
	if d < 10*time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

func pad(s string, n int) string {
	if missing := n - utf8.RuneCountInString(s); missing > 0 {
		return s + strings.Repeat(" ", missing)
	}
	return s
}

// fit pads or cuts to exactly n columns.
func fit(s string, n int) string {
	if utf8.RuneCountInString(s) > n {
		s = string([]rune(s)[:n-1]) + "…"
	}
	return pad(s, n)
}

// table writes rows in columns. Words stand flush left, numbers flush right: those of the columns whose heads begin with #.
func table(w io.Writer, s style, heads []string, rows [][]string) {
	header, widths, numbers := make([]string, len(heads)), make([]int, len(heads)), make([]bool, len(heads))
	for i, head := range heads {
		header[i], numbers[i] = strings.CutPrefix(head, "#")
	}
	for _, row := range append([][]string{header}, rows...) {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	write := func(row []string, sgr string) {
		var b bytes.Buffer
		for i, cell := range row {
			gap := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if numbers[i] {
				b.WriteString("  " + gap + cell)
			} else {
				b.WriteString("  " + cell + gap)
			}
		}
		text := strings.TrimRight(b.String(), " ")
		if sgr != "" {
			text = s.paint(sgr, text)
		}
		fmt.Fprintln(w, text)
	}
	write(header, dim)
	for _, row := range rows {
		write(row, "")
	}
}

// facts writes what is known of one thing: keys and values. A value without a key belongs to the one above it.
func facts(w io.Writer, s style, rows [][2]string) {
	width := 0
	for _, row := range rows {
		width = max(width, utf8.RuneCountInString(row[0]))
	}
	for _, row := range rows {
		fmt.Fprintf(w, "  %s  %s\n", s.paint(dim, pad(row[0], width)), row[1])
	}
}

func yesOrNo(is bool) string {
	if is {
		return "yes"
	}
	return "no"
}

// notices shows a program's warnings to the person in front of it, where a daemon would have a log.
type notices struct {
	style
	level slog.Level
	attrs []slog.Attr
}

// Enabled implements slog.Handler.
func (n notices) Enabled(_ context.Context, l slog.Level) bool { return l >= n.level }

// Handle implements slog.Handler.
func (n notices) Handle(_ context.Context, r slog.Record) error {
	var more []string
	add := func(a slog.Attr) bool {
		more = append(more, fmt.Sprintf("%s=%s", a.Key, a.Value))
		return true
	}
	for _, a := range n.attrs {
		add(a)
	}
	r.Attrs(add)
	text := "! " + r.Message
	if len(more) > 0 {
		text += " (" + strings.Join(more, ", ") + ")"
	}
	over := ""
	if n.tty { // what steps show of what is under way may stand there
		over = "\r\x1b[K"
	}
	_, err := fmt.Fprintf(n.w, "%s  %s\n", over, n.paint(yellow, printable(text)))
	return err
}

// WithAttrs implements slog.Handler.
func (n notices) WithAttrs(attrs []slog.Attr) slog.Handler {
	n.attrs = append(n.attrs[:len(n.attrs):len(n.attrs)], attrs...)
	return n
}

// WithGroup implements slog.Handler. Groups are not shown.
func (n notices) WithGroup(string) slog.Handler { return n }
