package vm

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
)

// ProcessStart returns when a process of this host began, in clock ticks since boot: field 22 of /proc/pid/stat
// (proc_pid_stat(5)), never 0. With the pid it names a process for ever. For a process that is gone the error is
// fs.ErrNotExist or unix.ESRCH.
func ProcessStart(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("read start of process %d: %w", pid, err)
	}
	start, err := parseStart(stat)
	if err != nil {
		return 0, fmt.Errorf("read start of process %d: %w", pid, err)
	}
	return start, nil
}

// parseStart finds the start in the line. Its second field is the program's name in parentheses, which may hold
// anything, spaces and parentheses too; the third field is behind the last of them.
func parseStart(stat []byte) (uint64, error) {
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("stat has %d fields behind the name, want 20 or more", len(fields))
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}
