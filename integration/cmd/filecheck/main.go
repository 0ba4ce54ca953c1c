// Command filecheck runs in a container and looks at a directory as programs use it. It is statically linked and brought
// in as a volume.
//
//	filecheck posix DIR              tries what POSIX and Linux promise; prints "NAME ok" or "NAME differs: WHY" a line
//	filecheck data DIR SEED OPS      random writes, reads, truncations and more, compared with a model in memory
//	filecheck small DIR FILES        creates, stats, reads and deletes small files; prints nanoseconds of each
//	filecheck stream DIR MIB         writes and reads a file from end to end; prints nanoseconds of each
//	filecheck entries DIR FILES      makes that many names in one directory, lists them and removes them
//	filecheck race DIR N             a rename race: swaps a directory for a symbolic link while walking through it
//	filecheck plain DIR              gives a mounted ext4 the kernel's own mount options
package main

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "filecheck:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("what and a directory are needed, have %q", args)
	}
	dir, numbers := args[1], []int{}
	for _, a := range args[2:] {
		n, err := strconv.Atoi(a)
		if err != nil {
			return err
		}
		numbers = append(numbers, n)
	}
	numbers = append(numbers, 0, 0)
	switch args[0] {
	case "posix":
		return posix(dir)
	case "data":
		return data(dir, uint64(numbers[0]), numbers[1])
	case "small":
		return small(dir, numbers[0])
	case "stream":
		return stream(dir, numbers[0])
	case "entries":
		return entries(dir, numbers[0])
	case "race":
		return race(dir, numbers[0])
	case "plain":
		return unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RELATIME, "nodiscard,init_itable,errors=continue")
	case "lock": // of the posix check: a second process
		return tryLock(dir)
	}
	return fmt.Errorf("%q is none of posix, data, small, stream, entries, race, plain", args[0])
}
