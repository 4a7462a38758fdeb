// Command hang is an agent that says one line on the console and then nothing, for the test of guests that never answer.
//
// It takes the place of flint-agent as /init. It must not end, because a kernel whose init ends panics.
package main

import "os"

func main() {
	if console, err := os.OpenFile("/dev/console", os.O_WRONLY, 0); err == nil {
		_, _ = console.WriteString("hang: here I am, and here I stay\n")
	}
	for {
		buf := make([]byte, 1)
		r, w, err := os.Pipe()
		if err != nil {
			continue
		}
		_, _ = r.Read(buf) // nobody writes
		_ = w.Close()
	}
}
