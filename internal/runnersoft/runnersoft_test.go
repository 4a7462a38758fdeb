package runnersoft

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"flint"
)

// file is one entry of an archive.
type file struct {
	name, content, link string
	kind                byte // 0: a file
	mode                int64
}

// archive packs a runner of a version, and more.
func archive(t testing.TB, version string, more ...file) []byte {
	t.Helper()
	return pack(t, append([]file{
		{name: "./", kind: tar.TypeDir},
		{name: "./bin/", kind: tar.TypeDir},
		{name: "./bin/Runner.Listener", content: listenerScript, mode: 0o6777},
		{name: "./bin/Runner.Listener.dll", content: version},
		{name: "./externals/node24/bin/node", content: "node " + version, mode: 0o755},
		{name: "./externals/node24/bin/npm", kind: tar.TypeSymlink, link: "../lib/npm.js"},
		{name: "./externals/node24/lib/npm.js", content: "npm"},
		{name: "./run.sh", content: "#!/bin/sh\nexit 99\n", mode: 0o755},
	}, more...)...)
}

// listenerScript says what it was given, and where its own directory is, as GitHub's runner finds it.
const listenerScript = `#!/bin/sh
root=$(dirname "$(dirname "$(readlink -f "$0")")")
mkdir -p "$root/_diag" "$root/_work"
printf '%s\n' "$*" >>"$root/_diag/calls"
printf '%s %s\n' "$ACTIONS_RUNNER_INPUT_JITCONFIG" "$ACTIONS_RUNNER_INPUT_TOKEN" >>"$root/_diag/secrets"
[ -x "$root/externals/node24/bin/node" ] || exit 3
[ "$1" = run ] && exit 7
exit 0
`

func pack(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Linkname: f.link, Typeflag: f.kind, Mode: f.mode, Size: int64(len(f.content)), ModTime: time.Unix(1, 0)}
		if f.kind == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(f.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func sha(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// far is a server of releases.
type far struct {
	*httptest.Server
	t      *testing.T
	mu     sync.Mutex
	files  map[string][]byte // by version
	newest string
	day    time.Time
	asked  []string                                          // each request, with its range
	edit   func(a *answer)                                   // what the API says; may be nil
	refuse func(w http.ResponseWriter, r *http.Request) bool // answers itself; may be nil
}

func newFar(t *testing.T, versions ...string) *far {
	f := &far{t: t, files: map[string][]byte{}, day: time.Date(2026, 11, 3, 15, 0, 0, 0, time.UTC)}
	for _, v := range versions {
		f.files[v], f.newest = archive(t, v), v
	}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *far) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, strings.TrimSpace(r.URL.Path+" "+r.Header.Get("Range")))
	if f.refuse != nil && f.refuse(w, r) {
		return
	}
	if name, ok := strings.CutPrefix(r.URL.Path, "/file/"); ok {
		http.Redirect(w, r, "/blob/"+name, http.StatusFound) // as GitHub does
		return
	}
	if name, ok := strings.CutPrefix(r.URL.Path, "/blob/"); ok {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(f.files[name]))
		return
	}
	what := strings.TrimPrefix(r.URL.Path, "/repos/actions/runner/releases/")
	version := strings.TrimPrefix(what, "tags/v")
	if what == "latest" {
		version = f.newest
	}
	content, ok := f.files[version]
	if !ok {
		http.NotFound(w, r)
		return
	}
	arch := Open(Config{}).arch
	a := answer{Tag: "v" + version, Published: f.day}
	a.Body = "## notes\n- linux <!-- BEGIN SHA linux-" + arch + " -->" + sha(content) + "<!-- END SHA linux-" + arch + " -->\n"
	err := json.Unmarshal(fmt.Appendf(nil, `{"assets":[{"name":"actions-runner-win-x64-1.zip"},{"name":"actions-runner-linux-%s-%s.tar.gz","size":%d,"digest":"sha256:%s","browser_download_url":"%s/file/%[2]s"}]}`,
		arch, version, len(content), sha(content), f.URL), &a)
	if err != nil {
		f.t.Error(err)
	}
	if f.edit != nil {
		f.edit(&a)
	}
	_ = json.NewEncoder(w).Encode(a)
}

func (f *far) store(dir string) *Store {
	s := Open(Config{Dir: dir, API: f.URL + "/", Log: slog.New(slog.DiscardHandler)})
	s.pause = time.Millisecond
	return s
}

func faultCode(err error) string {
	var f *flint.Fault
	if errors.As(err, &f) && f.Fix != "" {
		return f.Code
	}
	return fmt.Sprintf("%T %v", err, err)
}

// content is the names in the store, parts of downloads as "part".
func content(t *testing.T, s *Store) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		name := strings.TrimSuffix(e.Name(), "-"+s.arch)
		if strings.HasPrefix(name, partPrefix) {
			name = "part"
		}
		names = append(names, name)
	}
	return names
}

func TestPull(t *testing.T) {
	far := newFar(t, "2.334.0", "2.335.0")
	s := far.store(filepath.Join(t.TempDir(), "a", "b"))
	if _, err := s.Current(); !errors.Is(err, flint.ErrNotFound) || faultCode(err) != "runner.none" {
		t.Errorf("an empty store: %v", err)
	}
	old := unix.Umask(0o077) // a careful shell
	got, err := s.Pull(t.Context(), "v2.334.0", nil)
	unix.Umask(old)
	if err != nil || got.Version != "2.334.0" || !got.Current {
		t.Fatalf("%+v, %v", got, err)
	}
	if got, err = s.Pull(t.Context(), "", nil); err != nil || got.Version != "2.335.0" || got.Released.Format(time.DateOnly) != "2026-11-03" {
		t.Fatalf("%+v, %v", got, err)
	}
	for name, mode := range map[string]os.FileMode{"start": 0o755, "version": 0o644, "bin": 0o755 | os.ModeDir, "bin/Runner.Listener": 0o755, "externals/node24/bin": 0o755 | os.ModeDir} {
		for _, v := range []string{"2.334.0", "2.335.0"} {
			if info, err := os.Stat(filepath.Join(s.path(v+"-"+s.arch), name)); err != nil || info.Mode() != mode {
				t.Errorf("%s %s: %v, %v", v, name, info.Mode(), err)
			}
		}
	}
	if b, _ := os.ReadFile(filepath.Join(got.Dir, "version")); string(b) != "2.335.0\n2026-11-03\n" {
		t.Errorf("version %q", b)
	}
	far.asked = nil
	if _, err := s.Pull(t.Context(), "", nil); err != nil || len(far.asked) != 1 {
		t.Errorf("what is there is asked for again: %v, %v", far.asked, err)
	}
	if n := content(t, s); !slices.Equal(n, []string{"2.334.0", "2.335.0", "current", "lock"}) {
		t.Errorf("the store has %v", n)
	}
}

func TestLastTwoAreKept(t *testing.T) {
	far := newFar(t, "2.333.0", "2.334.0", "2.335.0", "2.335.1")
	s := far.store(t.TempDir())
	s.cfg.Pinned = []string{"2.333.0"}
	for _, v := range []string{"2.333.0", "2.334.0", "2.335.0", "2.335.1"} {
		if _, err := s.Pull(t.Context(), v, nil); err != nil {
			t.Fatal(err)
		}
	}
	versions := func() (list []string) {
		all, err := s.List()
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range all {
			if v.Size == 0 || v.Released.IsZero() {
				t.Errorf("%+v", v)
			}
			mark := ""
			if v.Current {
				mark = "*"
			}
			list = append(list, v.Version+mark)
		}
		return list
	}
	if v := versions(); !slices.Equal(v, []string{"2.335.1*", "2.335.0", "2.333.0"}) {
		t.Errorf("%v are there: want the current, one more, and the pinned", v)
	}
	if err := s.Remove(t.Context(), "2.333.0"); faultCode(err) != "runner.pinned" {
		t.Errorf("remove what is pinned: %v", err)
	}
	if err := s.Remove(t.Context(), "2.335.1", "9.9.9"); faultCode(err) != "runner.none" || len(versions()) != 3 {
		t.Errorf("remove what is not there: %v, left %v", err, versions())
	}
	if err := s.Remove(t.Context(), "2.335.1"); err != nil || !slices.Equal(versions(), []string{"2.335.0*", "2.333.0"}) {
		t.Errorf("after the current one is removed: %v, %v", versions(), err)
	}
	s.cfg.Pinned = nil
	if err := s.Remove(t.Context(), "2.335.0", "2.333.0"); err != nil || len(versions()) != 0 {
		t.Errorf("after all are removed: %v, %v", versions(), err)
	}
	if n := content(t, s); !slices.Equal(n, []string{"lock"}) {
		t.Errorf("left: %v", n)
	}
}

// TestNewestDoesNotGoBack: a person gave a newer one than this server has.
func TestNewestDoesNotGoBack(t *testing.T) {
	far := newFar(t, "2.334.0")
	s := far.store(t.TempDir())
	path := filepath.Join(t.TempDir(), "actions-runner-linux-"+s.arch+"-2.335.0.tar.gz")
	if err := os.WriteFile(path, archive(t, "2.335.0"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Import(t.Context(), File{Path: path}, nil); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Pull(t.Context(), "", nil); err != nil || got.Version != "2.335.0" {
		t.Errorf("%+v, %v", got, err)
	}
	// Its day is learnt when the server has it.
	far.files["2.335.0"], far.newest = archive(t, "2.335.0"), "2.335.0"
	if got, err := s.Pull(t.Context(), "", nil); err != nil || got.Released.IsZero() {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestReleasesThatAreRefused(t *testing.T) {
	asset := func(a *answer) *string { return &a.Assets[1].Digest }
	for name, tt := range map[string]struct {
		edit   func(a *answer)
		refuse func(w http.ResponseWriter, r *http.Request) bool
		code   string
		says   string
	}{
		"no digest":       {edit: func(a *answer) { *asset(a), a.Body = "", "" }, code: "runner.release", says: "no SHA-256"},
		"two digests":     {edit: func(a *answer) { *asset(a) = "sha256:" + strings.Repeat("0", 64) }, code: "runner.release", says: "two SHA-256"},
		"another digest":  {edit: func(a *answer) { *asset(a) = "sha512:" + strings.Repeat("0", 128) }, code: "runner.release", says: "no SHA-256"},
		"wrong digest":    {edit: func(a *answer) { *asset(a), a.Body = "sha256:"+strings.Repeat("0", 64), "" }, code: "runner.digest", says: "should be 0000"},
		"no architecture": {edit: func(a *answer) { a.Assets = a.Assets[:1] }, code: "runner.release", says: "has no actions-runner-linux-"},
		"another version": {edit: func(a *answer) { a.Tag = "v2.336.0" }, code: "runner.release"},
		"no version":      {edit: func(a *answer) { a.Tag = "../../etc" }, code: "runner.release", says: "is no version"},
		"no size":         {edit: func(a *answer) { a.Assets[1].Size = 0 }, code: "runner.release"},
		"huge":            {edit: func(a *answer) { a.Assets[1].Size = 1 << 40 }, code: "runner.release"},
		"longer":          {edit: func(a *answer) { a.Assets[1].Size-- }, code: "runner.release", says: "more than"},
		"shorter":         {edit: func(a *answer) { a.Assets[1].Size++ }, code: "runner.unreachable"},
		"a file":          {edit: func(a *answer) { a.Assets[1].URL = "file:///etc/passwd" }, code: "runner.release", says: "no address"},
		"no JSON":         {refuse: says(200, "<html>", nil), code: "runner.release"},
		"endless":         {refuse: says(200, strings.Repeat(" ", int(maxAnswer)+1), nil), code: "runner.release", says: "longer than 4MiB"},
		"404":             {refuse: says(404, "", nil), code: "runner.unknown"},
		"rate limit":      {refuse: says(403, "", http.Header{"X-Ratelimit-Remaining": {"0"}, "X-Ratelimit-Reset": {"4102444800"}}), code: "runner.limited"},
		"too many":        {refuse: says(429, "", http.Header{"Retry-After": {"60"}}), code: "runner.limited"},
		"forbidden":       {refuse: says(403, "", nil), code: "runner.unreachable", says: "403"},
		"502":             {refuse: says(502, "", nil), code: "runner.unreachable", says: "502"},
		"file is away":    {refuse: only("/blob/", says(404, "", nil)), code: "runner.unknown"},
		"file is limited": {refuse: only("/blob/", says(429, "", nil)), code: "runner.limited"},
		"file is broken":  {refuse: only("/blob/", says(500, "", nil)), code: "runner.unreachable"},
	} {
		t.Run(name, func(t *testing.T) {
			far := newFar(t, "2.334.0", "2.335.0")
			s := far.store(t.TempDir())
			if _, err := s.Pull(t.Context(), "2.334.0", nil); err != nil {
				t.Fatal(err)
			}
			far.edit, far.refuse = tt.edit, tt.refuse
			_, err := s.Pull(t.Context(), "2.335.0", nil)
			if faultCode(err) != tt.code || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%s: %v", faultCode(err), err)
			}
			if now, err := s.Current(); err != nil || now.Version != "2.334.0" {
				t.Errorf("the last good one did not stay: %+v, %v", now, err)
			}
			if n := slices.DeleteFunc(content(t, s), func(n string) bool { return n == "part" }); !slices.Equal(n, []string{"2.334.0", "current", "lock"}) {
				t.Errorf("left: %v", n)
			}
		})
	}
}

// says answers all that is asked for.
func says(status int, body string, header http.Header) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		for k, v := range header {
			w.Header()[k] = v
		}
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
		return true
	}
}

func only(path string, f func(http.ResponseWriter, *http.Request) bool) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		return strings.HasPrefix(r.URL.Path, path) && f(w, r)
	}
}

func TestDigestOfTheNotes(t *testing.T) {
	far := newFar(t, "2.335.0")
	far.edit = func(a *answer) { a.Assets[1].Digest = "" } // as before June 2025
	if _, err := far.store(t.TempDir()).Pull(t.Context(), "", nil); err != nil {
		t.Error(err)
	}
}

// breaks sends n bytes of each answer for a file and then breaks off.
func breaks(far *far, n int) func(w http.ResponseWriter, r *http.Request) bool {
	return only("/blob/", func(w http.ResponseWriter, r *http.Request) bool {
		whole := far.files[strings.TrimPrefix(r.URL.Path, "/blob/")]
		from := 0
		status := http.StatusOK
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err == nil {
			status = http.StatusPartialContent
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(whole)-1, len(whole)))
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(whole)-from))
		w.WriteHeader(status)
		_, _ = w.Write(whole[from:min(from+n, len(whole))])
		return true
	})
}

func TestDownloadGoesOn(t *testing.T) {
	far := newFar(t, "2.335.0")
	far.refuse = breaks(far, 100)
	var lines []string
	_, err := far.store(t.TempDir()).Pull(t.Context(), "", func(m flint.Milestone) {
		if m.Line != "" {
			lines = append(lines, m.Line)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	parts := len(far.files["2.335.0"])/100 + 1
	if blobs := slices.DeleteFunc(far.asked, func(s string) bool { return !strings.HasPrefix(s, "/blob/") }); len(blobs) < parts || blobs[1] != "/blob/2.335.0 bytes=100-" {
		t.Errorf("asked for %v", blobs)
	}
	if len(lines) == 0 || len(lines) > 20 {
		t.Errorf("progress: %v", lines)
	}
}

// TestDownloadOfAnEarlierProcess: what it left is used when it is right, and only then.
func TestDownloadOfAnEarlierProcess(t *testing.T) {
	for name, tt := range map[string]struct {
		left  func(whole []byte) []byte
		blobs []string
	}{
		"the beginning":   {func(b []byte) []byte { return b[:50] }, []string{"bytes=50-"}},
		"all":             {func(b []byte) []byte { return b }, nil},
		"something else":  {func([]byte) []byte { return []byte("something else") }, []string{"bytes=14-", ""}},
		"too much":        {func(b []byte) []byte { return append(slices.Clone(b), 'x') }, []string{""}},
		"as much of else": {func(b []byte) []byte { return make([]byte, len(b)) }, []string{""}},
	} {
		t.Run(name, func(t *testing.T) {
			far := newFar(t, "2.335.0")
			s := far.store(t.TempDir())
			whole := far.files["2.335.0"]
			if err := os.WriteFile(s.path(partPrefix+sha(whole)), tt.left(whole), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, stale := range []string{partPrefix + "of-another", tempPrefix + "x/y"} {
				if err := os.MkdirAll(s.path(stale), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := s.Pull(t.Context(), "", nil); err != nil {
				t.Fatal(err)
			}
			var blobs []string
			for _, a := range far.asked {
				if r, ok := strings.CutPrefix(a, "/blob/2.335.0"); ok {
					blobs = append(blobs, strings.TrimSpace(r))
				}
			}
			if !slices.Equal(blobs, tt.blobs) {
				t.Errorf("asked for %q, want %q", blobs, tt.blobs)
			}
			if n := content(t, s); !slices.Equal(n, []string{"2.335.0", "current", "lock"}) {
				t.Errorf("left: %v", n)
			}
		})
	}
}

// TestServerThatTakesNoRange: it sends the whole again, or refuses.
func TestServerThatTakesNoRange(t *testing.T) {
	for name, answer := range map[string]func(*far) func(http.ResponseWriter, *http.Request) bool{
		"the whole": func(f *far) func(http.ResponseWriter, *http.Request) bool {
			return only("/blob/", says(200, string(f.files["2.335.0"]), nil))
		},
		"416": func(*far) func(http.ResponseWriter, *http.Request) bool {
			return func(w http.ResponseWriter, r *http.Request) bool {
				return r.Header.Get("Range") != "" && says(416, "", nil)(w, r)
			}
		},
		"another part": func(*far) func(http.ResponseWriter, *http.Request) bool {
			return func(w http.ResponseWriter, r *http.Request) bool {
				return r.Header.Get("Range") != "" && says(206, "x", http.Header{"Content-Range": {"bytes 1-1/2"}})(w, r)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			far := newFar(t, "2.335.0")
			s := far.store(t.TempDir())
			whole := far.files["2.335.0"]
			far.refuse = answer(far)
			if err := os.WriteFile(s.path(partPrefix+sha(whole)), whole[:50], 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Pull(t.Context(), "", nil); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestSilentServer: a download that stands still is not waited for for ever.
func TestSilentServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		far := &far{t: t, files: map[string][]byte{"2.335.0": archive(t, "2.335.0")}, newest: "2.335.0"}
		far.Server = &httptest.Server{URL: "http://far"}
		s := far.store(t.TempDir())
		s.http = client(silent{far})
		began := time.Now()
		_, err := s.Pull(t.Context(), "", nil)
		if faultCode(err) != "runner.unreachable" || !strings.Contains(err.Error(), "nothing came for 1m0s") {
			t.Errorf("got %v", err)
		}
		if took := time.Since(began); took < fetchTries*time.Minute || took > (fetchTries+1)*time.Minute {
			t.Errorf("gave up after %s", took)
		}
	})
}

type silent struct{ far *far }

func (s silent) RoundTrip(r *http.Request) (*http.Response, error) {
	if strings.HasPrefix(r.URL.Path, "/file/") {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}
	w := httptest.NewRecorder()
	s.far.ServeHTTP(w, r)
	resp := w.Result()
	resp.Request = r
	return resp, nil
}

// TestFullDisk: it is said, what is there stays, and nothing half-made.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts a small disk")
	}
	far := newFar(t, "2.334.0", "2.335.0")
	noise := make([]byte, 600<<10)
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise)
	far.files["2.335.0"] = archive(t, "2.335.0", file{name: "big", content: strings.Repeat("a", 2<<20)})
	far.files["2.336.0"] = archive(t, "2.336.0", file{name: "big", content: string(noise)})
	s := far.store(t.TempDir())
	if err := unix.Mount("flint-test", s.cfg.Dir, "tmpfs", 0, "size=512k"); err != nil {
		t.Skip("needs to mount a tmpfs: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(s.cfg.Dir, 0); err != nil {
			t.Error(err)
		}
	})
	if _, err := s.Pull(t.Context(), "2.334.0", nil); err != nil {
		t.Fatal(err)
	}
	for _, v := range []string{"2.335.0", "2.336.0"} { // too large unpacked, and packed
		_, err := s.Pull(t.Context(), v, nil)
		if faultCode(err) != "runner.space" || !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s: %v", faultCode(err), err)
		}
		if now, err := s.Current(); err != nil || now.Version != "2.334.0" {
			t.Errorf("the last good one did not stay: %+v, %v", now, err)
		}
		if n := content(t, s); slices.Contains(n, "part") != (v == "2.335.0") || len(n) > 4 { // that was fetched as a whole
			t.Errorf("left: %v", n)
		}
	}
}

func TestTwoAtATime(t *testing.T) {
	far := newFar(t, "2.335.0")
	a, b := far.store(t.TempDir()), far.store("")
	b.cfg.Dir = a.cfg.Dir
	err := a.locked(func() error {
		_, err := b.Pull(t.Context(), "", nil)
		return err
	})
	if faultCode(err) != "runner.busy" || !errors.Is(err, flint.ErrConflict) {
		t.Errorf("got %v", err)
	}
	if _, err := b.Pull(t.Context(), "", nil); err != nil {
		t.Error(err)
	}
}

// TestStart runs what a VM runs: nothing is written beside the programs of the software, which are on a read-only drive.
func TestStart(t *testing.T) {
	far := newFar(t, "2.335.0")
	soft, err := far.store(t.TempDir()).Pull(t.Context(), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	before := names(t, soft.Dir)
	baked := filepath.Join(t.TempDir(), "actions-runner")
	if out, err := exec.Command("cp", "-R", soft.Dir, baked).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, tt := range map[string]struct{ line, calls, secrets string }{
		"JIT": {"c2VjcmV0", "run\n", "c2VjcmV0 \n"},
		"by itself": {
			`{"url":"https://github.com/acme","token":"T0","name":"flint-1","labels":["self-hosted","a"],"group":"big","ephemeral":true}`,
			"configure --unattended --ephemeral --disableupdate --no-default-labels --url https://github.com/acme --name flint-1 --labels self-hosted,a --runnergroup big\nrun\n",
			" T0\n \n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			work := t.TempDir()
			for diag, args := range map[string][]string{
				filepath.Join(work, "runner", "_diag"): {filepath.Join(soft.Dir, "start")},
				filepath.Join(baked, "_diag"):          InImage(t.TempDir(), baked), // an image's own
			} {
				cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
				cmd.Dir, cmd.Stdin = work, strings.NewReader(tt.line+"\n")
				out, err := cmd.CombinedOutput()
				var exit *exec.ExitError
				if !errors.As(err, &exit) || exit.ExitCode() != 7 {
					t.Fatalf("%v, want the runner's own exit code 7: %s", err, out)
				}
				for file, want := range map[string]string{"calls": tt.calls, "secrets": tt.secrets} {
					if b, err := os.ReadFile(filepath.Join(diag, file)); string(b) != want {
						t.Errorf("%s: %q, %v; want %q", filepath.Join(diag, file), b, err, want)
					}
				}
				if err := os.RemoveAll(diag); err != nil {
					t.Fatal(err)
				}
			}
			if after := names(t, soft.Dir); !slices.Equal(before, after) {
				t.Errorf("the software has changed: %v", after)
			}
		})
	}
}

func TestNoRunnerInImage(t *testing.T) {
	args := InImage("/nowhere", t.TempDir())
	out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 127 || !strings.Contains(string(out), "no runner software (bin/Runner.Listener) in: /nowhere ") {
		t.Errorf("%v: %s", err, out)
	}
	if usual := InImage(); !slices.Equal(usual[:4], args[:4]) || !slices.Contains(usual[4:], "/home/runner") {
		t.Errorf("without a directory it is %q", usual)
	}
}

func names(t *testing.T, dir string) (list []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		list = append(list, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}
