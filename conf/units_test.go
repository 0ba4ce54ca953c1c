package conf

import (
	"testing"
	"time"
)

func TestSize(t *testing.T) {
	for text, want := range map[string]Size{
		"0": 0, "1": 1, "1023": 1023, "16KiB": 16 << 10, "512MiB": 512 << 20, "10GiB": 10 << 30, "2TiB": 2 << 40, "1 GiB": 1 << 30,
		"9223372036854775807": 1<<63 - 1, "8388607TiB": 8388607 << 40,
	} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want {
			t.Errorf("%s: got %d, %v; want %d", text, s, err, want)
		}
		var again Size
		if err := again.UnmarshalText([]byte(s.String())); err != nil || again != s {
			t.Errorf("%d: String gives %s, read as %d, %v", s, s, again, err)
		}
	}
	for _, text := range []string{
		"", " ", "KiB", "-1", "+1", "1.5GiB", "1k", "1KB", "1Kib", "1 KiB ", "1  KiB", "1KiBKiB", "0x10", "1_000", "1e3", "9223372036854775808", "8388608TiB", "1\x00",
	} {
		s := Size(42)
		if err := s.UnmarshalText([]byte(text)); err == nil || s != 42 {
			t.Errorf("%q: got %d, %v", text, s, err)
		}
	}
}

func TestDuration(t *testing.T) {
	for text, want := range map[string]time.Duration{"0": 0, "0s": 0, "90s": 90 * time.Second, "1h30m": 90 * time.Minute, "500ms": time.Second / 2} {
		var d Duration
		if err := d.UnmarshalText([]byte(text)); err != nil || time.Duration(d) != want {
			t.Errorf("%s: got %v, %v", text, d, err)
		}
	}
	for _, text := range []string{"", "1", "s", "1d", "-1s", "1 s", "99999999h"} {
		d := Duration(42)
		if err := d.UnmarshalText([]byte(text)); err == nil || d != 42 {
			t.Errorf("%q: got %v, %v", text, d, err)
		}
	}
}
