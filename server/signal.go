package server

import (
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// sigRTMin is the first real-time signal that programs may use: glibc keeps two below it.
const sigRTMin = 34

// stopSignal picks CRI's signal, else the image's ("SIGINT", "INT", "2", "SIGRTMIN+3"), else SIGTERM.
func stopSignal(asked cri.Signal, image string) (unix.Signal, error) {
	if asked != cri.Signal_SIGNAL_RUNTIME_DEFAULT {
		return parseSignal(asked.String())
	}
	if image == "" {
		return unix.SIGTERM, nil
	}
	return parseSignal(image)
}

func parseSignal(text string) (unix.Signal, error) {
	name := strings.TrimPrefix(strings.ToUpper(text), "SIGNAL_")
	if n, err := strconv.Atoi(name); err == nil {
		if n < 1 || n > 64 {
			return 0, invalid("stop signal", "%q is not a signal", text)
		}
		return unix.Signal(n), nil
	}
	name = strings.TrimPrefix(name, "SIG")
	// CRI's enum spells SIGRTMIN+3 as SIGRTMINPLUS3 and SIGRTMAX-3 as SIGRTMAXMINUS3.
	name = strings.NewReplacer("PLUS", "+", "MINUS", "-").Replace(name)
	for prefix, base := range map[string]int{"RTMIN": sigRTMin, "RTMAX": 64} {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			offset := 0
			if rest != "" {
				var err error
				if offset, err = strconv.Atoi(rest); err != nil {
					return 0, invalid("stop signal", "%q is not a signal", text)
				}
			}
			if n := base + offset; n >= sigRTMin && n <= 64 {
				return unix.Signal(n), nil
			}
			return 0, invalid("stop signal", "%q is not a signal", text)
		}
	}
	if alias, ok := map[string]string{"CLD": "CHLD", "POLL": "IO", "IOT": "ABRT"}[name]; ok {
		name = alias
	}
	if s := unix.SignalNum("SIG" + name); s != 0 {
		return s, nil
	}
	return 0, invalid("stop signal", "%q is not a signal", text)
}

// criSignals are the enum values by numbers of signals; the first of several names of a number counts.
var criSignals = sync.OnceValue(func() map[int32]cri.Signal {
	signals := map[int32]cri.Signal{}
	for value := range int32(len(cri.Signal_name)) {
		s := cri.Signal(value)
		n, err := parseSignal(s.String())
		if _, taken := signals[int32(n)]; err == nil && !taken {
			signals[int32(n)] = s
		}
	}
	return signals
})

// criSignal is the enum value of a signal number, for a status; RUNTIME_DEFAULT when there is none.
func criSignal(n int32) cri.Signal { return criSignals()[n] }
