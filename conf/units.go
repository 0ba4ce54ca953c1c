package conf

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Units of Size.
const (
	KiB Size = 1 << 10
	MiB Size = 1 << 20
	GiB Size = 1 << 30
	TiB Size = 1 << 40
)

// Size is a number of bytes, never negative. In TOML it is an integer or a string of digits with one of the
// units KiB, MiB, GiB and TiB. Units of ten are refused, so that nobody gets 7 % less than expected.
type Size int64

var sizeUnits = []struct {
	name string
	size Size
}{{"TiB", TiB}, {"GiB", GiB}, {"MiB", MiB}, {"KiB", KiB}}

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Size) UnmarshalText(text []byte) error {
	digits, unit := string(text), Size(1)
	for _, u := range sizeUnits {
		if number, ok := strings.CutSuffix(digits, u.name); ok {
			digits, unit = number, u.size
			break
		}
	}
	n, err := strconv.ParseUint(strings.TrimSuffix(digits, " "), 10, 63)
	if err != nil || Size(n) > math.MaxInt64/unit {
		return fmt.Errorf(`%.40q is not a size; write a number of bytes or such as "16KiB", "512MiB", "10GiB", "1TiB"`, text)
	}
	*s = Size(n) * unit
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// String is the size in the largest unit that divides it.
func (s Size) String() string {
	for _, u := range sizeUnits {
		if s != 0 && s%u.size == 0 {
			return strconv.FormatInt(int64(s/u.size), 10) + u.name
		}
	}
	return strconv.FormatInt(int64(s), 10)
}

// Duration is a span of time, never negative. In TOML it is a string with units: "90s", "5m", "1h30m".
type Duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil || v < 0 {
		return fmt.Errorf(`%.40q is not a duration; write such as "500ms", "90s", "5m" or "4h"`, text)
	}
	*d = Duration(v)
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// String is as of time.Duration.
func (d Duration) String() string { return time.Duration(d).String() }
