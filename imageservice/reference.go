package imageservice

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"go.podman.io/image/v5/docker/reference"
	"go.podman.io/image/v5/pkg/shortnames"
	"go.podman.io/image/v5/pkg/sysregistriesv2"
	"go.podman.io/image/v5/types"
	"go.podman.io/storage/pkg/configfile"
)

// normalize parses a reference as Docker does: docker.io and :latest are the defaults. A tag beside a
// digest is dropped, since the digest decides.
func normalize(ref string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return withoutTagBesideDigest(named)
}

func withoutTagBesideDigest(named reference.Named) (reference.Named, error) {
	if d, ok := named.(reference.Digested); ok {
		return reference.WithDigest(reference.TrimNamed(named), d.Digest())
	}
	return reference.TagNameOnly(named), nil
}

// candidate is one full name a pull may try.
type candidate struct {
	named  reference.Named
	record func() error // remembers a successful choice as a short-name alias, if the configuration says so
}

// candidates resolves a reference to the full names to pull, in order. Short names follow registries.conf;
// on a machine without one they mean docker.io, as kubelet's users expect.
func (s *Service) candidates(ref string) ([]candidate, error) {
	sys := s.system()
	if named, short, err := parse(ref); err != nil {
		return nil, err
	} else if !short {
		named, err = withoutTagBesideDigest(named)
		return []candidate{{named: named}}, err
	}
	if configured, err := registriesConfigured(sys); err != nil {
		return nil, err
	} else if !configured {
		named, err := normalize(ref)
		return []candidate{{named: named}}, err
	}
	mode, err := sysregistriesv2.GetShortNameMode(sys)
	if err != nil {
		return nil, fmt.Errorf("short-name mode: %w", err)
	}
	// A daemon must not ask, even when it was started from a terminal.
	noPrompt := types.ShortNameModeDisabled
	sys.ShortNameMode = &noPrompt
	resolved, err := shortnames.Resolve(sys, ref)
	if err != nil {
		return nil, fmt.Errorf("short name: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(resolved.PullCandidates) > 1 && mode == types.ShortNameModeEnforcing {
		var names []string
		for _, c := range resolved.PullCandidates {
			names = append(names, c.Value.String())
		}
		return nil, fmt.Errorf("short name %q could be any of %s and short-name-mode is enforcing: %w", ref, strings.Join(names, ", "), errdefs.ErrInvalidArgument)
	}
	var out []candidate
	for _, c := range resolved.PullCandidates {
		named, err := withoutTagBesideDigest(c.Value)
		if err != nil {
			return nil, err
		}
		out = append(out, candidate{named: named, record: c.Record})
	}
	return out, nil
}

// parse tells whether a reference is short, that is without a registry.
func parse(ref string) (reference.Named, bool, error) {
	if shortnames.IsShortName(ref) {
		return nil, true, nil
	}
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, false, fmt.Errorf("image reference %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	return named, false, nil
}

// localNames are the names under which the store may have the image that a reference means. None for what
// is not a reference; it may still be the beginning of an ID.
func (s *Service) localNames(ref string) ([]string, error) {
	named, short, err := parse(ref)
	if err != nil {
		return nil, nil
	}
	found := []reference.Named{named}
	if short {
		sys := s.system()
		configured, err := registriesConfigured(sys)
		if err != nil {
			return nil, err
		}
		found = nil
		if configured {
			if found, err = shortnames.ResolveLocally(sys, ref); err != nil {
				return nil, fmt.Errorf("short name %q: %w", ref, err)
			}
		}
		if named, err := normalize(ref); err == nil {
			found = append(found, named)
		}
	}
	var names []string
	for _, named := range found {
		if named, err := withoutTagBesideDigest(named); err == nil {
			names = append(names, named.String())
		}
	}
	return names, nil
}

// registriesConfigured tells whether there is any registries.conf file, in the places where the library
// looks.
func registriesConfigured(sys *types.SystemContext) (bool, error) {
	paths, err := configfile.GetSearchPaths(&configfile.File{
		Name: "registries", Extension: "conf", EnvironmentName: "CONTAINERS_REGISTRIES_CONF",
		CustomConfigFilePath:            sys.SystemRegistriesConfPath,
		CustomConfigFileDropInDirectory: sys.SystemRegistriesConfDirPath,
		UserId:                          os.Geteuid(),
	})
	if err != nil {
		return false, fmt.Errorf("registries.conf: %w", err)
	}
	files := paths.MainFiles
	for _, dir := range paths.DropInDirectories {
		dropIns, err := filepath.Glob(filepath.Join(dir, "*.conf"))
		if err != nil {
			return false, fmt.Errorf("registries.conf: %w", err)
		}
		files = append(files, dropIns...)
	}
	for _, file := range files {
		if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
			return true, err
		}
	}
	return false, nil
}
