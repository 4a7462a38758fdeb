package main

import "strings"

// kernelArgs is what the host tells the agent by kernel arguments.
type kernelArgs struct {
	Channel string   // flint.channel: "serial", "vsock", or empty: whatever there is
	Drives  []string // flint.drives: the drives' names, in the order the guest numbers them
	Memory  bool     // flint.root=memory: what is written to the root goes to memory, not to the scratch drive
}

func parseCmdline(s string) kernelArgs {
	var a kernelArgs
	for _, f := range strings.Fields(s) {
		k, v, _ := strings.Cut(f, "=")
		switch k {
		case "flint.channel":
			a.Channel = v
		case "flint.root":
			a.Memory = v == "memory"
		case "flint.drives":
			a.Drives = nil
			if v != "" {
				a.Drives = strings.Split(v, ",")
			}
		}
	}
	return a
}
