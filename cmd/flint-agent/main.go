// Command flint-agent is the program in the guest: /init of the initramfs, then the agent the host talks to.
//
// As PID 1 it loads the boot modules, mounts the drives, switches to the overlaid root, and either hands over to the
// image's systemd, under which it goes on as a service (`flint-agent serve`) and is told of the end of the boot
// (`flint-agent up`), or stays PID 1 and reaps. Called as
// modprobe it loads modules for a kernel whose image has no kmod. It must not know GitHub or what its commands are for,
// and must not keep anything beyond the VM's life: the VM is thrown away.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
)

// version is the build's, set by the linker (-X main.version=…).
var version = "dev"

func main() {
	switch {
	case filepath.Base(os.Args[0]) == "modprobe":
		os.Exit(modprobe(os.Args[1:]))
	case os.Getpid() == 1:
		boot(context.Background())
	case len(os.Args) == 2 && os.Args[1] == "serve":
		if err := serveUnderInit(context.Background()); err != nil {
			complain(err)
			os.Exit(1)
		}
	case len(os.Args) == 2 && os.Args[1] == "up":
		if err := os.WriteFile(upFile, nil, 0o600); err != nil {
			complain(err)
			os.Exit(1)
		}
	default:
		fmt.Fprintln(os.Stderr, "flint-agent runs in a guest of flint: as /init, as `flint-agent serve` and `flint-agent up` under systemd, or as modprobe")
		os.Exit(2)
	}
}

// complain tells the console.
func complain(err error) { fmt.Fprintf(os.Stderr, "flint-agent: %v\n", err) }

// newLog writes to the console, which is slow: warnings and errors only.
func newLog() *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
}
