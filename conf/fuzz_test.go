package conf

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

// FuzzLoad loads a file and a fragment. Whatever they hold, either the result is complete and valid, or each
// problem names a file and a line in it; and nothing that is no TOML is taken.
func FuzzLoad(f *testing.F) {
	f.Add(string(DefaultTOML()), "[vm]\nmemory = \"1GiB\"\n")
	f.Add("vm = {vcpus = 0x2}\nhandlers.\"a\\u0062\" = {vmm = 'qemu'}", "[[vm]]\n[handlers.host]\n[handlers.\"\"]")
	f.Add("socket = \"\"\"\n/x\"\"\"\nvm.vcpus = 1\n[vm]", "[log]\nlevel = [1, {a = 2}]\nlevel = 1979-05-27T07:32:00Z")
	f.Add("# \xff", "a.b.c = nan\r\n")
	dir := f.TempDir()
	path, fragment := filepath.Join(dir, "config.toml"), filepath.Join(dir, "conf.d", "a.toml")
	if err := os.Mkdir(filepath.Dir(fragment), 0o755); err != nil {
		f.Fatal(err)
	}
	located := regexp.MustCompile(`^(` + regexp.QuoteMeta(path) + `|` + regexp.QuoteMeta(fragment) + `):([0-9]+): `)
	f.Fuzz(func(t *testing.T, main, more string) {
		for name, content := range map[string]string{path: main, fragment: more} {
			if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		c, err := Load(path, true)
		if err == nil {
			if err := c.Validate(); err != nil {
				t.Errorf("loaded, but not valid: %v", err)
			}
			for _, name := range []string{"", "crivm", "clh", "qemu"} {
				if _, ok := c.Handlers[name]; !ok {
					t.Errorf("no handler %q", name)
				}
			}
			for _, content := range []string{main, more} {
				var any map[string]any
				if err := toml.Unmarshal([]byte(content), &any); err != nil {
					t.Errorf("loaded, but not TOML: %v", err)
				}
			}
			return
		}
		for line := range strings.SplitSeq(err.Error(), "\n") {
			m := located.FindStringSubmatch(line)
			if m == nil && strings.HasPrefix(line, "and ") || len(main) > maxFileSize || len(more) > maxFileSize {
				continue
			}
			if m == nil || m[2] == "0" {
				t.Errorf("%q does not begin with the place of the problem", line)
			}
		}
	})
}
