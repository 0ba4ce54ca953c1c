package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// warmHandler is the RuntimeClass handler whose pods take VMs that are booted already. Its scratch disks are of another size
// than the default handler's: handlers whose VMs are alike share their pool.
const warmHandler = "warm"

// poolConfig configures so many slots, one boot at a time, with the CPU weight of pods so that a busy machine fills them too.
// Thirty VMs that boot at once in software emulation take their time.
const poolConfig = `[vm]
boot_timeout = "9m"

[handlers.warm]
pool_size = %d
scratch_size = "1026MiB"

[pool]
parallel_boots = 1
cpu_weight = 100
`

// setPool gives crivm a pool of so many VMs, 0 for none, by a restart; slots beyond them are gone then.
func (b *bench) setPool(ctx context.Context, slots int) error {
	if slots == b.slots {
		return nil
	}
	path := filepath.Join(b.n.Dir, "conf.d/60-pool.toml")
	if err := os.WriteFile(path, fmt.Appendf(nil, poolConfig, slots), 0o644); err != nil {
		return err
	}
	if err := b.restart(ctx); err != nil {
		return fmt.Errorf("with a pool of %d: %w", slots, err)
	}
	b.slots = slots
	return b.awaitPool(ctx)
}

// restart gives crivm a new daemon.
func (b *bench) restart(ctx context.Context) error {
	if err := errors.Join(b.n.StopDaemon(), b.n.StartDaemon(ctx)); err != nil {
		return fmt.Errorf("restart: %w", err)
	}
	b.crivm.pid = b.n.PID()
	return nil
}

// poolState is what Status tells of a pool.
type poolState struct {
	Ready, Booting, Rehearsed, Hits int
	LastFailure                     string
}

// pool sums up what there is: one pool, or none.
func (b *bench) pool(ctx context.Context) (sum poolState, err error) {
	status, err := b.crivm.runtime.Status(ctx, true)
	if err != nil {
		return sum, err
	}
	var pools []poolState
	if text := status.GetInfo()["pools"]; text != "" {
		if err := json.Unmarshal([]byte(text), &pools); err != nil {
			return sum, fmt.Errorf("pools of crivm: %w", err)
		}
	}
	for _, p := range pools {
		sum.Ready, sum.Booting, sum.Rehearsed, sum.Hits = sum.Ready+p.Ready, sum.Booting+p.Booting, sum.Rehearsed+p.Rehearsed, sum.Hits+p.Hits
		sum.LastFailure = p.LastFailure
	}
	return sum, nil
}

// rehearsalWait is how long full pools are waited for until all of their slots have rehearsed.
const rehearsalWait = 2 * time.Minute

// awaitPool waits until all slots are ready and have rehearsed and nothing boots: boots would slow what is measured.
func (b *bench) awaitPool(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	var last poolState
	var full time.Time
	err := await(ctx, 200*time.Millisecond, func() (done bool, err error) {
		if last, err = b.pool(ctx); last.Ready != b.slots || last.Booting != 0 {
			full = time.Time{}
			return false, err
		}
		if full.IsZero() {
			full = time.Now()
		}
		return last.Rehearsed == b.slots || time.Since(full) > rehearsalWait, err
	})
	if err != nil {
		return fmt.Errorf("waiting for %d slots: %+v: %w", b.slots, last, err)
	}
	return nil
}
