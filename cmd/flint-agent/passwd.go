package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
)

const (
	runnerName = "runner"
	runnerID   = 1001 // GitHub's own images give theirs this uid
)

// user is an account of the guest.
type user struct {
	Name, Home, Shell string
	UID, GID          uint32
	Groups            []uint32 // supplementary ones
}

// group is a line of /etc/group.
type group struct {
	Name    string
	GID     uint32
	Members []string
}

// users looks accounts up in a root's /etc, by its files alone.
type users struct {
	root string // "/" in a guest
	mu   sync.Mutex
}

func (us *users) path(name string) string { return filepath.Join(us.root, name) }

// resolve finds who: a name, or uid[:gid], which need no account. The user "runner" is made where it is missing.
func (us *users) resolve(who string) (user, error) {
	us.mu.Lock()
	defer us.mu.Unlock()
	if who == "" {
		who = "root"
	}
	accounts, groups, err := us.read()
	if err != nil {
		return user{}, err
	}
	at := slices.IndexFunc(accounts, func(u user) bool { return u.Name == who })
	switch uid, gid, numeric := parseIDs(who); {
	case at >= 0:
		return withGroups(accounts[at], groups), nil
	case numeric:
		u := user{Name: strconv.Itoa(int(uid)), Home: "/", Shell: "/bin/sh", UID: uid, GID: uid}
		if at := slices.IndexFunc(accounts, func(u user) bool { return u.UID == uid }); at >= 0 {
			u = withGroups(accounts[at], groups)
		}
		if gid != nil {
			u.GID = *gid
		}
		return u, nil
	case who == "root": // an image may have no /etc/passwd at all
		return user{Name: "root", Home: "/root", Shell: "/bin/sh"}, nil
	case who == runnerName:
		return us.addRunner(accounts, groups)
	}
	return user{}, errors.New("the image has no such account")
}

func (us *users) read() ([]user, []group, error) {
	p, err := os.ReadFile(us.path("etc/passwd"))
	if except(err, os.ErrNotExist) != nil {
		return nil, nil, fmt.Errorf("read accounts: %w", err)
	}
	g, err := os.ReadFile(us.path("etc/group"))
	if except(err, os.ErrNotExist) != nil {
		return nil, nil, fmt.Errorf("read groups: %w", err)
	}
	return parsePasswd(string(p)), parseGroup(string(g)), nil
}

// parsePasswd reads the lines of a passwd file that are well formed.
func parsePasswd(s string) []user {
	var us []user
	for line := range strings.Lines(s) {
		f := strings.Split(strings.TrimRight(line, "\n"), ":")
		if len(f) != 7 || f[0] == "" {
			continue
		}
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if err1 != nil || err2 != nil {
			continue
		}
		u := user{Name: f[0], Home: f[5], Shell: f[6], UID: uint32(uid), GID: uint32(gid)}
		if u.Home == "" {
			u.Home = "/"
		}
		if u.Shell == "" {
			u.Shell = "/bin/sh"
		}
		us = append(us, u)
	}
	return us
}

// parseGroup reads the lines of a group file that are well formed.
func parseGroup(s string) []group {
	var gs []group
	for line := range strings.Lines(s) {
		f := strings.Split(strings.TrimRight(line, "\n"), ":")
		if len(f) != 4 || f[0] == "" {
			continue
		}
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil {
			continue
		}
		g := group{Name: f[0], GID: uint32(gid)}
		if f[3] != "" {
			g.Members = strings.Split(f[3], ",")
		}
		gs = append(gs, g)
	}
	return gs
}

// parseIDs reads uid or uid:gid.
func parseIDs(s string) (uid uint32, gid *uint32, ok bool) {
	a, b, both := strings.Cut(s, ":")
	u, err := strconv.ParseUint(a, 10, 32)
	if err != nil {
		return 0, nil, false
	}
	if both {
		g, err := strconv.ParseUint(b, 10, 32)
		if err != nil {
			return 0, nil, false
		}
		v := uint32(g)
		gid = &v
	}
	return uint32(u), gid, true
}

func withGroups(u user, gs []group) user {
	u.Groups = nil
	for _, g := range gs {
		if g.GID != u.GID && slices.Contains(g.Members, u.Name) {
			u.Groups = append(u.Groups, g.GID)
		}
	}
	return u
}

// addRunner makes the account the runner software runs as, with a home, and a member of the groups that let a job do
// what it can do on GitHub's own runners.
func (us *users) addRunner(accounts []user, groups []group) (user, error) {
	u := user{Name: runnerName, Home: "/home/" + runnerName, Shell: "/bin/sh", UID: runnerID}
	for slices.ContainsFunc(accounts, func(o user) bool { return o.UID == u.UID }) {
		u.UID++
	}
	if executable(us.path("bin/bash")) == nil {
		u.Shell = "/bin/bash"
	}
	own := group{Name: runnerName}
	if at := slices.IndexFunc(groups, func(g group) bool { return g.Name == runnerName }); at >= 0 {
		own = groups[at]
	} else {
		own.GID = u.UID
		for slices.ContainsFunc(groups, func(g group) bool { return g.GID == own.GID }) {
			own.GID++
		}
	}
	u.GID = own.GID
	if err := errors.Join(
		us.joinGroups(own),
		us.addLine("etc/passwd", 0o644, fmt.Sprintf("%s:x:%d:%d::%s:%s", u.Name, u.UID, u.GID, u.Home, u.Shell)),
		us.addLine("etc/shadow", 0o640, u.Name+":!:19000:0:99999:7:::"),
		us.makeHome(u),
		us.allowSudo(u),
	); err != nil {
		return user{}, fmt.Errorf("make account: %w", err)
	}
	_, groups, err := us.read() // as they are now
	if err != nil {
		return user{}, err
	}
	return withGroups(u, groups), nil
}

// joinGroups makes the runner a member of docker and sudo, where the image has them, and of its own group.
func (us *users) joinGroups(own group) error {
	name := us.path("etc/group")
	old, err := os.ReadFile(name)
	if except(err, os.ErrNotExist) != nil {
		return err
	}
	return replaceFile(name, withRunner(string(old), own), 0o644)
}

// withRunner returns the text of a group file in which the runner is in its groups. Other lines, and malformed ones,
// stay as they are.
func withRunner(groups string, own group) string {
	var b strings.Builder
	missing := true
	for line := range strings.Lines(groups) {
		line = strings.TrimRight(line, "\n")
		if gs := parseGroup(line); len(gs) == 1 {
			g := gs[0]
			missing = missing && g.Name != own.Name
			if (g.Name == "docker" || g.Name == "sudo") && !slices.Contains(g.Members, runnerName) {
				if g.Members != nil {
					line += ","
				}
				line += runnerName
			}
		}
		b.WriteString(line + "\n")
	}
	if missing {
		fmt.Fprintf(&b, "%s:x:%d:\n", own.Name, own.GID)
	}
	return b.String()
}

// addLine appends a line to a file, which keeps its mode and owner if it is there.
func (us *users) addLine(name string, mode os.FileMode, line string) error {
	name = us.path(name)
	old, err := os.ReadFile(name)
	if except(err, os.ErrNotExist) != nil {
		return err
	}
	if len(old) > 0 && old[len(old)-1] != '\n' {
		line = "\n" + line
	}
	f, err := os.OpenFile(name, os.O_APPEND|os.O_CREATE|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line + "\n")
	return errors.Join(err, f.Close())
}

func (us *users) makeHome(u user) error {
	home := us.path(u.Home)
	if err := os.MkdirAll(home, 0o755); err != nil {
		return err
	}
	return os.Chown(home, int(u.UID), int(u.GID))
}

// allowSudo lets the runner become root without a password, where the image has sudo. The VM is the boundary.
func (us *users) allowSudo(u user) error {
	if executable(us.path("usr/bin/sudo")) != nil {
		return nil
	}
	if st, err := os.Stat(us.path("etc/sudoers.d")); err != nil || !st.IsDir() {
		return nil
	}
	return os.WriteFile(us.path("etc/sudoers.d/flint-runner"), []byte(u.Name+" ALL=(ALL) NOPASSWD:ALL\n"), 0o440)
}

// replaceFile writes a file anew, in the place of whatever was there, a link included.
func replaceFile(name, content string, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".flint-*")
	if err != nil {
		return err
	}
	_, err = f.WriteString(content)
	err = errors.Join(err, f.Chmod(mode), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		os.Remove(f.Name()) // it may not be there
	}
	return err
}
