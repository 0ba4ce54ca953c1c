package chclient

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Version of a VMM as far as features depend on it. The API has no list of the fields it knows and ignores
// those it does not, so everything newer than Minimum is gated on it.
type Version struct {
	Major, Minor int
}

// String has the form of release tags, "v53.0".
func (v Version) String() string { return fmt.Sprintf("v%d.%d", v.Major, v.Minor) }

// Less orders versions.
func (v Version) Less(o Version) bool {
	return v.Major < o.Major || v.Major == o.Major && v.Minor < o.Minor
}

var (
	// Minimum has the fixes for what a guest could do to its VMM and host: CVE-2026-27211 (fixed in v50.1 and
	// v51.0) and CVE-2026-45782 (v51.2 and v52.0).
	Minimum = Version{51, 2}
	// Recommended is the first release with working half-close of vsock streams, clean errors for states and a
	// further batch of fixes against hostile guests.
	Recommended = Version{53, 0}
	// doubled is v52.0, which keeps private guest memory twice.
	doubled = Version{52, 0}
)

// A release may have a "v", and is followed by a patch level, "-dirty" or "-123-gabcdef" of a build.
var versionText = regexp.MustCompile(`(?:^|[ \t])v?(\d{1,4})\.(\d{1,4})(?:[.\-+ \t]|$)`)

// ParseVersion reads the first line of "cloud-hypervisor --version", or build_version of vmm.ping.
func ParseVersion(s string) (Version, error) {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	m := versionText.FindStringSubmatch(strings.TrimSpace(line))
	if m == nil {
		return Version{}, fmt.Errorf("no version in %q: %w", printable(line), errdefs.ErrInvalidArgument)
	}
	major, _ := strconv.Atoi(m[1]) // digits by the pattern
	minor, _ := strconv.Atoi(m[2])
	return Version{major, minor}, nil
}

// CheckVersion refuses releases that must not run pods. s is what ParseVersion reads.
func CheckVersion(s string) error {
	v, err := ParseVersion(s)
	if err != nil {
		return err
	}
	switch {
	case v.Less(Minimum):
		return fmt.Errorf("cloud-hypervisor %s has holes that guests can use (CVE-2026-27211, CVE-2026-45782); use %s or later: %w", v, Recommended, errdefs.ErrFailedPrecondition)
	case v == doubled:
		return fmt.Errorf("cloud-hypervisor %s keeps guest memory twice; use %s or later: %w", v, Recommended, errdefs.ErrFailedPrecondition)
	}
	return nil
}
