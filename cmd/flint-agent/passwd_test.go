package main

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

const somePasswd = `root:x:0:0:root:/root:/bin/bash
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
# a comment
broken:x:one:1::/:/bin/sh
short:x:1
builder:x:1001:1001::/home/builder:
nohome:x:1005:1005:::`

const someGroup = `root:x:0:
sudo:x:27:builder
docker:x:999:other,builder
runnerlike:x:1002:
odd:x:no:builder`

func TestResolve(t *testing.T) {
	root := t.TempDir()
	write(t, root, "etc/passwd", somePasswd)
	write(t, root, "etc/group", someGroup)
	us := &users{root: root}
	for who, want := range map[string]user{
		"":         {Name: "root", Home: "/root", Shell: "/bin/bash"},
		"root":     {Name: "root", Home: "/root", Shell: "/bin/bash"},
		"builder":  {Name: "builder", Home: "/home/builder", Shell: "/bin/sh", UID: 1001, GID: 1001, Groups: []uint32{27, 999}},
		"nohome":   {Name: "nohome", Home: "/", Shell: "/bin/sh", UID: 1005, GID: 1005},
		"1001":     {Name: "builder", Home: "/home/builder", Shell: "/bin/sh", UID: 1001, GID: 1001, Groups: []uint32{27, 999}},
		"1001:7":   {Name: "builder", Home: "/home/builder", Shell: "/bin/sh", UID: 1001, GID: 7, Groups: []uint32{27, 999}},
		"4000":     {Name: "4000", Home: "/", Shell: "/bin/sh", UID: 4000, GID: 4000},
		"4000:100": {Name: "4000", Home: "/", Shell: "/bin/sh", UID: 4000, GID: 100},
	} {
		got, err := us.resolve(who)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, %v", who, got, err)
		}
	}
	for _, who := range []string{"nobodyknows", "broken", "1:x", "-1", "4294967296"} {
		if got, err := us.resolve(who); err == nil {
			t.Errorf("%q: %+v", who, got)
		}
	}
	if u, err := (&users{root: t.TempDir()}).resolve("root"); err != nil || u.Home != "/root" {
		t.Errorf("root of an image without accounts: %+v, %v", u, err)
	}
}

func TestRunnerIsMade(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: gives the home directory to another user")
	}
	root := t.TempDir()
	write(t, root, "etc/passwd", somePasswd) // without a newline at its end
	write(t, root, "etc/group", someGroup)
	write(t, root, "etc/shadow", "root:*:1::::::\n")
	write(t, root, "bin/bash", "")
	write(t, root, "usr/bin/sudo", "")
	write(t, root, "etc/sudoers.d/README", "")
	for _, program := range []string{"bin/bash", "usr/bin/sudo"} {
		if err := os.Chmod(filepath.Join(root, program), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(root, "etc/shadow"), 0o640); err != nil {
		t.Fatal(err)
	}
	us := &users{root: root}
	want := user{Name: "runner", Home: "/home/runner", Shell: "/bin/bash", UID: 1002, GID: 1003, Groups: []uint32{27, 999}}
	want.GID = 1003 // 1002 is another group's
	for range 2 {   // the second time it is there
		got, err := us.resolve("runner")
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if s := read("etc/passwd"); s != somePasswd+"\nrunner:x:1002:1003::/home/runner:/bin/bash\n" {
		t.Errorf("passwd:\n%s", s)
	}
	if s := read("etc/group"); !strings.Contains(s, "sudo:x:27:builder,runner\n") || !strings.Contains(s, "docker:x:999:other,builder,runner\n") ||
		!strings.HasSuffix(s, "odd:x:no:builder\nrunner:x:1003:\n") {
		t.Errorf("group:\n%s", s)
	}
	if s := read("etc/shadow"); s != "root:*:1::::::\nrunner:!:19000:0:99999:7:::\n" {
		t.Errorf("shadow:\n%s", s)
	}
	if st, err := os.Stat(filepath.Join(root, "etc/shadow")); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("shadow: %v, %v", st.Mode(), err)
	}
	if s := read("etc/sudoers.d/flint-runner"); s != "runner ALL=(ALL) NOPASSWD:ALL\n" {
		t.Errorf("sudoers: %s", s)
	}
}

func TestRunnerIsMadeAmongMalformedGroups(t *testing.T) {
	const groups = "docker:x:990\ndocker:x:990:\nsudo:x:no:\nsudo\nsudo:x:27:a\nsudo:x:28:b\n"
	const want = "docker:x:990\ndocker:x:990:runner\nsudo:x:no:\nsudo\nsudo:x:27:a,runner\nsudo:x:28:b,runner\nrunner:x:1001:\n"
	if got := withRunner(groups, group{Name: runnerName, GID: 1001}); got != want {
		t.Errorf("group:\n%s", got)
	}
	if got := withRunner(want, group{Name: runnerName, GID: 1001}); got != want {
		t.Errorf("the second time:\n%s", got)
	}
}

func FuzzAccounts(f *testing.F) {
	f.Add(somePasswd, someGroup, "builder")
	f.Add("a:b:1:2:3:4:5\n", "a:::a,,\n", "1:2")
	f.Add("", "docker:x:990\ndocker:x:990:\n", "")
	f.Add("", "sudo:x:no:a\nsudo:x:1:,\nrunner:x:7\nrunner:x:8:\r\n", "")
	f.Fuzz(func(t *testing.T, passwd, groups, who string) {
		gs := parseGroup(groups)
		for _, u := range parsePasswd(passwd) {
			if u.Name == "" || u.Home == "" || u.Shell == "" || strings.ContainsAny(u.Name+u.Home, ":\n") {
				t.Errorf("account %+v", u)
			}
			withGroups(u, gs)
		}
		parseIDs(who)
		before, after := gs, parseGroup(withRunner(groups, group{Name: runnerName, GID: runnerID}))
		if len(after) == len(before)+1 {
			before = append(before, group{Name: runnerName, GID: runnerID})
		}
		if len(after) != len(before) {
			t.Fatalf("%d groups became %d", len(before), len(after))
		}
		for i, g := range after {
			was := before[i].Members
			if (g.Name == "docker" || g.Name == "sudo") && !slices.Contains(was, runnerName) {
				was = append(was, runnerName)
			}
			if g.Name != before[i].Name || g.GID != before[i].GID || !slices.Equal(g.Members, was) {
				t.Errorf("group %+v became %+v", before[i], g)
			}
		}
	})
}
