package conf

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// allKeys lists the dotted keys of a configuration struct, but for those of handlers, which are [vm]'s.
func allKeys(t reflect.Type, table string) []string {
	var keys []string
	for i := range t.NumField() {
		f := t.Field(i)
		key := table + f.Tag.Get("toml")
		switch f.Type.Kind() {
		case reflect.Struct:
			keys = append(keys, allKeys(f.Type, key+".")...)
		case reflect.Map:
		default:
			keys = append(keys, key)
		}
	}
	return keys
}

var tomlKey = regexp.MustCompile(`^[a-z]+(_[a-z]+)*$`)

func TestEveryFieldHasAKey(t *testing.T) {
	keys := allKeys(reflect.TypeFor[Config](), "")
	if len(keys) < 40 {
		t.Fatalf("only %d keys found", len(keys))
	}
	for _, key := range keys {
		for part := range strings.SplitSeq(key, ".") {
			if !tomlKey.MatchString(part) {
				t.Errorf("key %q is not snake case", key)
			}
		}
	}
}

func TestDefaultTOMLIsDefault(t *testing.T) {
	got, err := loadText(t, string(DefaultTOML()))
	if err != nil {
		t.Fatal(err)
	}
	if want := Default(); !reflect.DeepEqual(got, want) {
		t.Errorf("the default file gives\n%+v\nthe defaults are\n%+v", got, want)
	}
	if err := Default().Validate(); err != nil {
		t.Errorf("the defaults are refused: %v", err)
	}
}

// TestDefaultTOMLIsComplete finds every key of the struct in the default file, commented, and no other.
func TestDefaultTOMLIsComplete(t *testing.T) {
	values, comments := defaultLines(t)
	for _, key := range allKeys(reflect.TypeFor[Config](), "") {
		if _, ok := values[key]; !ok {
			t.Errorf("key %s does not occur", key)
			continue
		}
		if len(comments[key]) < 30 || !strings.HasSuffix(comments[key], ".") {
			t.Errorf("key %s has no comment that gives unit and meaning: %q", key, comments[key])
		}
		delete(values, key)
	}
	for key := range values {
		t.Errorf("key %s is not in the struct", key)
	}
}

// TestDefaultTOMLGivesUnits checks that a comment tells what its key takes.
func TestDefaultTOMLGivesUnits(t *testing.T) {
	_, comments := defaultLines(t)
	words := map[reflect.Type]string{reflect.TypeFor[Size](): "Size", reflect.TypeFor[Duration](): "Duration", reflect.TypeFor[bool](): "Whether"}
	d := newDecoder()
	for key, comment := range comments {
		v, ok := d.lookup(strings.Split(key, "."))
		if !ok {
			t.Errorf("%s is not a key", key)
			continue
		}
		if word := words[v.Type()]; !strings.HasPrefix(comment, word) {
			t.Errorf("the comment of %s does not start with %q: %s", key, word, comment)
		}
	}
}

// defaultLines reads the default file's values and comments as text, by key.
func defaultLines(t *testing.T) (values, comments map[string]string) {
	t.Helper()
	values, comments = map[string]string{}, map[string]string{}
	table, comment := "", ""
	for line := range strings.Lines(string(DefaultTOML())) {
		line = strings.TrimSuffix(line, "\n")
		switch key, value, assigned := strings.Cut(line, " = "); {
		case strings.HasPrefix(line, "#"):
			comment += strings.TrimPrefix(line, "#")
			continue
		case strings.HasPrefix(line, "["):
			table = strings.Trim(line, "[]") + "."
		case assigned:
			values[table+key], comments[table+key] = value, strings.TrimSpace(comment)
		}
		comment = ""
	}
	return values, comments
}

var docRow = regexp.MustCompile("^\\| `([a-z_]+)` \\| `([^`]*)` \\| (.{20,}) \\|$")

func TestReferenceIsComplete(t *testing.T) {
	reference, err := os.ReadFile("../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	values, _ := defaultLines(t)
	found := map[string]bool{}
	table, handlerKeys := "", ""
	for line := range strings.Lines(string(reference)) {
		line = strings.TrimSpace(line)
		if title, ok := strings.CutPrefix(line, "## "); ok {
			if table = ""; strings.HasPrefix(title, "[") {
				table = strings.Trim(title, "[]") + "."
			}
		}
		if table == "handlers." && strings.HasPrefix(line, "| `") {
			handlerKeys += line
		}
		m := docRow.FindStringSubmatch(line)
		if m == nil || table == "handlers." {
			continue
		}
		key := table + m[1]
		found[key] = true
		if want, ok := values[key]; !ok {
			t.Errorf("%s is not a key", key)
		} else if m[2] != want {
			t.Errorf("%s: default %s, want %s", key, m[2], want)
		}
	}
	for _, key := range allKeys(reflect.TypeFor[Config](), "") {
		if !found[key] {
			t.Errorf("%s is missing in docs/configuration.md", key)
		}
	}
	for _, key := range allKeys(reflect.TypeFor[VM](), "") {
		if !strings.Contains(handlerKeys, "`"+key+"`") {
			t.Errorf("%s is missing among the keys of a handler", key)
		}
	}
}

// TestReferenceExamples loads the TOML examples of the reference.
func TestReferenceExamples(t *testing.T) {
	reference, err := os.ReadFile("../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	examples := regexp.MustCompile("(?s)```toml\n(.*?)```").FindAllStringSubmatch(string(reference), -1)
	if len(examples) == 0 {
		t.Fatal("no examples found")
	}
	for _, example := range examples {
		if _, err := loadText(t, example[1]); err != nil {
			t.Error(err)
		}
	}
}

func TestDefaultTOMLIsACopy(t *testing.T) {
	DefaultTOML()[0] = 'x'
	if DefaultTOML()[0] != '#' {
		t.Error("a caller can change it")
	}
	Default().CNI.BinDirs[0] = "/x"
	if Default().CNI.BinDirs[0] == "/x" {
		t.Error("a caller can change the defaults")
	}
}

// writeFiles writes files below a new directory and returns the path of config.toml in it.
func writeFiles(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "config.toml")
}

func loadText(t testing.TB, text string) (Config, error) {
	t.Helper()
	return Load(writeFiles(t, map[string]string{"config.toml": text}), true)
}
