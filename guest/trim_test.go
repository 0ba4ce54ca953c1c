package guest

import "testing"

func TestWorthTrimming(t *testing.T) {
	t.Parallel()
	const m = 1 << 20
	for _, c := range []struct {
		what                            string
		usedThen, writtenSince, usedNow uint64
		want                            bool
	}{
		{"nothing happened", 100 * m, 0, 100 * m, false},
		{"files were written", 100 * m, 50 * m, 150 * m, false},
		{"metadata beside them", 100 * m, 53 * m, 150 * m, false},
		{"files were deleted", 100 * m, 0, 90 * m, true},
		{"files were written and deleted", 100 * m, 50 * m, 100 * m, true},
		{"files were allocated and not written yet", 100 * m, 0, 150 * m, false},
		{"files were overwritten", 100 * m, 50 * m, 101 * m, true},
	} {
		if got := worthTrimming(c.usedThen, c.writtenSince, c.usedNow); got != c.want {
			t.Errorf("%s: %v", c.what, got)
		}
	}
}
