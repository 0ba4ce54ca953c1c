package server

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// No more VMs boot at a time than there are turns. One that hangs does not keep its turn, and who has gone takes none.
func TestBootTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Server{boots: make(chan struct{}, 2)}
		turn := func() func() {
			t.Helper()
			done, err := s.bootTurn(t.Context(), time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			return done
		}
		first, hangs := turn(), turn()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if _, err := s.bootTurn(ctx, time.Minute); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("a third boots beside two: %v", err)
		}
		first()
		second := turn()
		start := time.Now()
		third := turn()
		if waited := time.Since(start); waited != 50*time.Second {
			t.Errorf("waited %s for a VM that hangs, and is 10 s at it", waited)
		}
		hangs() // gives no turn back a second time
		if len(s.boots) != 2 {
			t.Errorf("%d boot, want 2", len(s.boots))
		}
		second()
		third()
		if len(s.boots) != 0 {
			t.Errorf("%d boot, want none", len(s.boots))
		}
	})
}
