//go:build linux && amd64

package kvm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ioctls of linux/kvm.h.
const (
	getAPIVersion       = 0xAE00
	createVM            = 0xAE01
	getVCPUMmapSize     = 0xAE04
	getSupportedCPUID   = 0xC008AE05
	createVCPU          = 0xAE41
	setUserMemoryRegion = 0x4020AE46
	setTSSAddr          = 0xAE47
	run                 = 0xAE80
	setRegs             = 0x4090AE82
	getSregs            = 0x8138AE83
	setSregs            = 0x4138AE84
	setCPUID2           = 0x4008AE90
)

// Exit reasons in struct kvm_run.
const (
	exitIO       = 2
	exitShutdown = 8
	exitIntr     = 10
	exitInternal = 17
)

type segment struct {
	base                                         uint64
	limit                                        uint32
	selector                                     uint16
	kind, present, dpl, db, s, l, g, avl, unused uint8
	_                                            uint8
}

type table struct {
	base  uint64
	limit uint16
	_     [3]uint16
}

type sregs struct {
	cs, ds, es, fs, gs, ss, tr, ldt         segment
	gdt, idt                                table
	cr0, cr2, cr3, cr4, cr8, efer, apicBase uint64
	interrupts                              [4]uint64
}

type regs struct {
	rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp uint64
	r8, r9, r10, r11, r12, r13, r14, r15   uint64
	rip, rflags                            uint64
}

type memoryRegion struct {
	slot, flags     uint32
	guest, size, at uint64
}

type cpuid struct {
	n, _    uint32
	entries [256][10]uint32
}

// Layout of the guest's 64 KiB of memory.
const (
	guestSize = 0x10000
	pml4      = 0x1000
	pdpt      = 0x2000
	pd        = 0x3000
	gdt       = 0x4000
	idt       = 0x5000
	code      = 0x6000
	handler   = 0x7000
	operand   = 0x8000 // 16 bytes for cmpxchg16b
	fpuState  = 0x9000 // xsave area
	stack     = 0xb000
)

const (
	resultPort = 0xf4
	success    = 0x2a
)

// program tries what an ordinary kernel does early and an emulator tends not to know. It writes success
// to resultPort.
var program = []byte{
	0x31, 0xc0, //                         xor   eax, eax
	0x31, 0xd2, //                         xor   edx, edx
	0xbb, 0x01, 0x00, 0x00, 0x00, //       mov   ebx, 1
	0xb9, 0x02, 0x00, 0x00, 0x00, //       mov   ecx, 2
	0xf0, 0x48, 0x0f, 0xc7, 0x0e, //       lock cmpxchg16b [rsi]
	0x75, 0x25, //                         jnz   failed
	0xb8, 0x01, 0x00, 0x00, 0x00, //       mov   eax, 1
	0x31, 0xd2, //                         xor   edx, edx
	0x48, 0x0f, 0xae, 0x27, //             xsave64 [rdi]
	0x48, 0x0f, 0xae, 0x2f, //             xrstor64 [rdi]
	0x31, 0xed, //                         xor   ebp, ebp
	0xcc,             //                   int3
	0x83, 0xfd, 0x01, //                   cmp   ebp, 1
	0x75, 0x0e, //                         jnz   failed
	0xb9, 0x80, 0xf0, 0xfa, 0x02, //       mov   ecx, 50000000
	0xff, 0xc9, //                   loop: dec   ecx
	0x75, 0xfc, //                         jnz   loop
	0xb0, success, //                      mov   al, success
	0xe6, resultPort, //                   out   resultPort, al
	0xf4,       //                         hlt
	0xb0, 0x01, //                 failed: mov   al, 1
	0xe6, resultPort, //                   out   resultPort, al
	0xf4, //                               hlt
}

// breakpoint is the int3 handler.
var breakpoint = []byte{
	0xff, 0xc5, // inc ebp
	0x48, 0xcf, // iretq
}

func probe(ctx context.Context, program []byte) error {
	dev, err := os.OpenFile("/dev/kvm", os.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w: %w", errdefs.ErrNotFound, err)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: %w", errdefs.ErrPermissionDenied, err)
	case err != nil:
		return fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	}
	vcpu := &vcpu{started: make(chan struct{}), ended: make(chan error, 1)}
	go func() {
		runtime.LockOSThread() // the vCPU belongs to this thread, which is the one to interrupt
		defer runtime.UnlockOSThread()
		defer dev.Close()
		vcpu.ended <- vcpu.live(int(dev.Fd()), program)
	}()
	select {
	case err := <-vcpu.ended:
		return err
	case <-ctx.Done():
		return vcpu.interrupt(ctx.Err())
	}
}

type vcpu struct {
	started chan struct{} // closed when tid and run are set
	ended   chan error
	tid     int
	run     []byte // struct kvm_run, shared with the kernel
}

// interrupt brings the vCPU's thread back from KVM_RUN. A thread that does not come back within a second
// is left behind, which costs one thread.
func (c *vcpu) interrupt(why error) error {
	select {
	case <-c.started:
	case err := <-c.ended:
		return err
	case <-time.After(interruptWait):
		return fmt.Errorf("%w: making a VM hangs: %w", errdefs.ErrUnavailable, why)
	}
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for limit := time.Now().Add(interruptWait); time.Now().Before(limit); {
		c.run[1] = 1 // immediate_exit: covers a signal that comes just before KVM_RUN
		// The Go runtime's own wake-up signal: it has a handler and no meaning.
		_ = unix.Tgkill(os.Getpid(), c.tid, unix.SIGURG)
		select {
		case err := <-c.ended:
			if err == nil || !errors.Is(err, errInterrupted) {
				return err
			}
			return why
		case <-t.C:
		}
	}
	return why
}

var errInterrupted = errors.New("interrupted")

func ioctl(fd int, request, arg uintptr) (int, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
		if errno == unix.EINTR && request != run {
			continue
		}
		if errno != 0 {
			return -1, errno
		}
		return int(r), nil
	}
}

// live makes a VM with one vCPU and runs the program.
func (c *vcpu) live(dev int, program []byte) error {
	unavailable := func(step string, err error) error {
		return fmt.Errorf("%w: %s: %w", errdefs.ErrUnavailable, step, err)
	}
	if v, err := ioctl(dev, getAPIVersion, 0); err != nil || v != 12 {
		return fmt.Errorf("%w: API version %d: %v", errdefs.ErrUnavailable, v, err)
	}
	vm, err := ioctl(dev, createVM, 0)
	if err != nil {
		return unavailable("create VM", err)
	}
	defer unix.Close(vm)
	_, _ = ioctl(vm, setTSSAddr, 0xfffbd000) // old Intel processors need it, others ignore it

	mem, err := unix.Mmap(-1, 0, guestSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return unavailable("guest memory", err)
	}
	defer func() { _ = unix.Munmap(mem) }()
	fill(mem, program)
	region := memoryRegion{size: guestSize, at: uint64(uintptr(unsafe.Pointer(&mem[0])))}
	if _, err := ioctl(vm, setUserMemoryRegion, uintptr(unsafe.Pointer(&region))); err != nil {
		return unavailable("guest memory", err)
	}
	cpu, err := ioctl(vm, createVCPU, 0)
	if err != nil {
		return unavailable("create vCPU", err)
	}
	defer unix.Close(cpu)
	if err := prepare(dev, cpu); err != nil {
		return unavailable("set up vCPU", err)
	}
	size, err := ioctl(dev, getVCPUMmapSize, 0)
	if err != nil {
		return unavailable("size of kvm_run", err)
	}
	// Not unmapped: interrupt may still write to it. One page or three, once per probe.
	if c.run, err = unix.Mmap(cpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return unavailable("map kvm_run", err)
	}
	c.tid = unix.Gettid()
	close(c.started)
	return c.execute(cpu)
}

func (c *vcpu) execute(cpu int) error {
	for {
		_, err := ioctl(cpu, run, 0)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			if c.run[1] != 0 {
				return errInterrupted
			}
			continue // the Go runtime's preemption
		}
		if err != nil {
			return fmt.Errorf("%w: run: %w", errdefs.ErrUnavailable, err)
		}
		switch reason := binary.LittleEndian.Uint32(c.run[8:]); reason {
		case exitIntr:
			continue
		case exitIO:
			port := binary.LittleEndian.Uint16(c.run[34:])
			off := binary.LittleEndian.Uint64(c.run[40:])
			if port == resultPort && off < uint64(len(c.run)) && c.run[off] == success {
				return nil
			}
			return fmt.Errorf("%w: the guest computed something wrong", errdefs.ErrUnavailable)
		case exitShutdown:
			return fmt.Errorf("%w: the guest's first instructions end in a triple fault", errdefs.ErrUnavailable)
		case exitInternal:
			return fmt.Errorf("%w: it cannot execute or emulate an instruction that kernels use (internal error %d)",
				errdefs.ErrUnavailable, binary.LittleEndian.Uint32(c.run[32:]))
		default:
			return fmt.Errorf("%w: the guest's first instructions end with exit reason %d", errdefs.ErrUnavailable, reason)
		}
	}
}

// fill writes page tables, descriptor tables and code.
func fill(mem, program []byte) {
	put := binary.LittleEndian.PutUint64
	put(mem[pml4:], pdpt|3)
	put(mem[pdpt:], pd|3)
	put(mem[pd:], 0x83)                   // one 2 MiB page
	put(mem[gdt+8:], 0x00af9b000000ffff)  // 64-bit code
	put(mem[gdt+16:], 0x00cf93000000ffff) // data
	gate := mem[idt+3*16:]                // int3
	put(gate, uint64(handler&0xffff)|8<<16|0x8e<<40)
	copy(mem[code:], program)
	copy(mem[handler:], breakpoint)
}

// prepare puts the vCPU into 64-bit mode at the program's start.
func prepare(dev, cpu int) error {
	var ids cpuid
	ids.n = uint32(len(ids.entries))
	if _, err := ioctl(dev, getSupportedCPUID, uintptr(unsafe.Pointer(&ids))); err != nil {
		return fmt.Errorf("supported CPUID: %w", err)
	}
	if _, err := ioctl(cpu, setCPUID2, uintptr(unsafe.Pointer(&ids))); err != nil {
		return fmt.Errorf("CPUID: %w", err)
	}
	var s sregs
	if _, err := ioctl(cpu, getSregs, uintptr(unsafe.Pointer(&s))); err != nil {
		return fmt.Errorf("system registers: %w", err)
	}
	s.cs = segment{limit: 0xffffffff, selector: 8, kind: 11, present: 1, s: 1, l: 1, g: 1}
	data := segment{limit: 0xffffffff, selector: 16, kind: 3, present: 1, db: 1, s: 1, g: 1}
	s.ds, s.es, s.fs, s.gs, s.ss = data, data, data, data, data
	s.gdt = table{base: gdt, limit: 23}
	s.idt = table{base: idt, limit: 0xfff}
	const (
		pe, mp, et, ne, wp, pg      = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 16, 1 << 31
		pae, osfxsr, osxmm, osxsave = 1 << 5, 1 << 9, 1 << 10, 1 << 18
		lme, lma                    = 1 << 8, 1 << 10
	)
	s.cr0, s.cr3, s.cr4, s.efer = pe|mp|et|ne|wp|pg, pml4, pae|osfxsr|osxmm|osxsave, lme|lma
	if _, err := ioctl(cpu, setSregs, uintptr(unsafe.Pointer(&s))); err != nil {
		return fmt.Errorf("64-bit mode: %w", err)
	}
	r := regs{rip: code, rsp: stack, rsi: operand, rdi: fpuState, rflags: 2}
	if _, err := ioctl(cpu, setRegs, uintptr(unsafe.Pointer(&r))); err != nil {
		return fmt.Errorf("registers: %w", err)
	}
	return nil
}
