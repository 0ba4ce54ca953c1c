package chclient

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// As v53.0 writes them.
const booting = "{\n  \"timestamp\": {\n    \"secs\": 1,\n    \"nanos\": 532659502\n  },\n  \"source\": \"vm\",\n  \"event\": \"booting\",\n  \"properties\": null\n}"
const removed = "{\n  \"timestamp\": {\n    \"secs\": 2,\n    \"nanos\": 0\n  },\n  \"source\": \"vm\",\n  \"event\": \"device-removed\",\n  \"properties\": {\n    \"id\": \"d\",\n    \"bdf\": \"0000:00:05.0\"\n  }\n}"

func names(t *testing.T, r io.Reader, resync bool) (got []string, err error) {
	t.Helper()
	d := NewEventDecoder(r, resync)
	for range 100 {
		e, err := d.Next()
		if err != nil {
			return got, err
		}
		got = append(got, e.Name())
	}
	t.Fatal("endless")
	return nil, nil
}

func TestEvents(t *testing.T) {
	d := NewEventDecoder(strings.NewReader(booting+"\n\n"+removed+"\n\n"), false)
	e, err := d.Next()
	if err != nil || e.Name() != "vm/booting" || e.Properties != nil || e.Timestamp.Duration() != 1532659502*time.Nanosecond {
		t.Errorf("%+v, %v", e, err)
	}
	e, err = d.Next()
	if err != nil || e.Name() != "vm/device-removed" || e.Properties["id"] != "d" {
		t.Errorf("%+v, %v", e, err)
	}
	if _, err := d.Next(); err != io.EOF {
		t.Errorf("end: %v", err)
	}
}

func TestEventFraming(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		resync     bool
		want       string
		eof        bool
	}{
		{"no newline at the end", booting, false, "vm/booting", true},
		{"newlines between lost", booting + removed + booting + "\n\n", false, "vm/booting vm/device-removed vm/booting", true},
		{"cut", booting + "\n\n" + removed[:40], false, "vm/booting", true},
		{"begins amid an event", booting[30:] + "\n\n" + removed + "\n\n", true, "vm/device-removed", true},
		{"begins amid properties", removed[len(removed)-20:] + "\n\n" + booting + "\n", true, "vm/booting", true},
		{"begins with one", booting + "\n\n" + booting + "\n\n", true, "vm/booting vm/booting", true},
		{"text", "hello\n" + booting, false, "", false},
		{"text after", booting + "\nhello\n", false, "vm/booting", false},
		{"bad JSON", "{\n\"a\":\n}\n", false, "", false},
		{"wrong types", "{\n\"source\": 1\n}\n", false, "", false},
		{"endless event", "{\n" + strings.Repeat("\"x\": 1,\n", 10000) + "}\n", false, "", false},
		{"endless line", "{\n" + strings.Repeat("x", 1<<20) + "\n}\n", false, "", false},
		{"endless line while looking for a start", strings.Repeat("x", 1<<20) + "\n" + booting, true, "vm/booting", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, r := range []io.Reader{strings.NewReader(tc.text), iotest.OneByteReader(strings.NewReader(tc.text))} {
				got, err := names(t, r, tc.resync)
				if strings.Join(got, " ") != tc.want || (err == io.EOF) != tc.eof {
					t.Errorf("%v, %v", got, err)
				}
			}
		})
	}
	if _, err := names(t, io.MultiReader(strings.NewReader(booting+"\n"), iotest.ErrReader(errors.New("broken"))), false); err == nil || err == io.EOF {
		t.Errorf("read error: %v", err)
	}
}

func FuzzEvents(f *testing.F) {
	f.Add([]byte(booting+"\n\n"+removed), false)
	f.Add([]byte(booting+removed), true)
	f.Add([]byte("}{\n}{\n}\n"), true)
	f.Fuzz(func(t *testing.T, b []byte, resync bool) {
		d := NewEventDecoder(bytes.NewReader(b), resync)
		for range len(b) + 1 {
			e, err := d.Next()
			if err != nil {
				return
			}
			if len(e.Source)+len(e.Event) > maxEvent {
				t.Fatal("unbounded")
			}
		}
		t.Fatal("more events than bytes")
	})
}
