// Command testinit is /init of the suite's misbehaving guests. The kernel hands it the word after
// "contract=" of its command line as an environment variable.
package main

import (
	"fmt"
	"os"
	"syscall"
	"time"
)

func main() {
	fmt.Println("testinit runs")
	switch os.Getenv("contract") {
	case "reboot":
		_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
	case "poweroff":
		_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
	case "flood":
		for i := 0; ; i++ {
			fmt.Printf("flood %09d \x1b[31m %s\n", i, "0123456789012345678901234567890123456789012345678901234567890123456789")
		}
	case "silent":
		for {
			time.Sleep(time.Hour)
		}
	}
	// The end of init is a panic.
}
