// Command crivm-agent is the first process of a crivm guest: /init of its initramfs. All of it is in
// package guest.
package main

import (
	"os"

	"github.com/crivm/crivm/guest"
)

// version is set by the linker.
var version = "development"

func main() { os.Exit(guest.Main(version, os.Args)) }
