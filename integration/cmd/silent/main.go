// Command silent is the init of a guest that boots and never says anything, for tests.
package main

import "golang.org/x/sys/unix"

func main() {
	for {
		unix.Pause()
	}
}
