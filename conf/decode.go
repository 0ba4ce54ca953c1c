package conf

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"sort"
	"strconv"
	"strings"
	"unicode"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// place is where a key is written.
type place struct {
	file string
	line int // from 1
}

// decoder applies files to a configuration, one after another, and remembers where each key was set last.
// It walks the document itself, where go-toml would stop at the first value of a wrong type.
type decoder struct {
	config   Config
	handlers map[string][]func(*VM) // what [handlers.NAME] sets, in order
	places   map[string]place       // by key; of the last file that sets it
	failed   map[string]bool        // keys whose value could not be taken
	problems []error
	broken   bool // a file ended early, so what follows from its values says nothing
}

func newDecoder() *decoder {
	return &decoder{config: defaults(), handlers: map[string][]func(*VM){}, places: map[string]place{}, failed: map[string]bool{}}
}

// document is the file at hand.
type document struct {
	file    string
	content []byte
	keys    map[string]int // line of each key and table header of this file
	unknown string         // key of the current table header when there is no such table
	starts  []expression

	scanned, newlines int // newlines of content[:scanned]; keys are met in their order
}

// expression is a table header or an assignment of a document.
type expression struct {
	offset int // of its first byte, or a little later
	key    string
	line   int
}

func (d *decoder) problem(at place, key, format string, args ...any) {
	d.problems = append(d.problems, &problem{place: at, keys: []string{key}, text: fmt.Sprintf(format, args...)})
}

// decode applies one file.
func (d *decoder) decode(file string, content []byte) {
	before := len(d.problems)
	doc := &document{file: file, content: content, keys: map[string]int{}}
	var p unstable.Parser
	p.Reset(content)
	var table []string
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind == unstable.KeyValue {
			d.keyValue(doc, table, e, true)
			continue
		}
		path, at, offset := doc.locate(nil, e)
		key := dotted(path)
		doc.starts = append(doc.starts, expression{offset, key, at.line})
		table, doc.unknown = path, ""
		target, ok := d.lookup(path)
		switch {
		case e.Kind == unstable.ArrayTable && ok:
			d.problem(at, key, "no key takes an array of tables; write [%s]", key)
			doc.unknown = key
		case !ok:
			d.problem(at, key, "unknown table")
			doc.unknown = key
		case target.IsValid():
			d.problem(at, key, "is not a table; it takes %s", wanted(target.Type()))
			doc.unknown = key
		default:
			d.once(doc, at, key)
			d.mention(path, at)
		}
	}
	if p.Error() != nil {
		d.cut(doc, &p)
	} else {
		d.strict(doc, d.problems[before:])
	}
}

// cut reports the error of syntax that ended a document early.
func (d *decoder) cut(doc *document, p *unstable.Parser) {
	d.broken = true
	at := place{doc.file, doc.newlines + 1}
	text := p.Error().Error()
	if syntax := (*unstable.ParserError)(nil); errors.As(p.Error(), &syntax) {
		at.line = 1 + bytes.Count(doc.content[:p.Range(syntax.Highlight).Offset], []byte{'\n'})
	}
	if n := len(doc.starts); n > 0 {
		text = fmt.Sprintf("%s (at or after %s)", text, doc.starts[n-1].key)
	}
	d.problem(at, "", "%s", strings.Map(printable, text))
}

// keyValue applies an assignment; the keys of an inline table count as if each had been written alone.
func (d *decoder) keyValue(doc *document, table []string, e *unstable.Node, top bool) {
	path, at, offset := doc.locate(table, e)
	key := dotted(path)
	if top {
		doc.starts = append(doc.starts, expression{offset, key, at.line})
	}
	if doc.unknown != "" {
		return // the table has been reported
	}
	target, ok := d.lookup(path)
	if !ok {
		d.problem(at, key, "unknown key")
		return
	}
	if !d.once(doc, at, key) {
		return
	}
	value := e.Value()
	if !target.IsValid() {
		if value.Kind != unstable.InlineTable {
			d.problem(at, key, "is a table, not a key that takes %s", kindName(value.Kind))
			return
		}
		d.mention(path, at)
		for it := value.Children(); it.Next(); {
			d.keyValue(doc, path, it.Node(), false)
		}
		return
	}
	set, err := decodeValue(target.Type(), value)
	if err != nil {
		d.failed[key] = true
		d.places[key] = at
		d.problem(at, key, "%v", err)
		return
	}
	delete(d.failed, key)
	d.places[key] = at
	if path[0] == "handlers" {
		d.mention(path, at)
		name, field := path[1], path[2]
		d.handlers[name] = append(d.handlers[name], func(vm *VM) {
			v, _ := child(reflect.ValueOf(vm).Elem(), field)
			v.Set(set)
		})
		return
	}
	target.Set(set)
}

// once reports a key or table that the file has already. It tells whether it is new.
func (d *decoder) once(doc *document, at place, key string) bool {
	line, dup := doc.keys[key]
	if dup {
		d.problem(at, key, "is already set in line %d", line)
		return false
	}
	doc.keys[key] = at.line
	return true
}

// mention makes the handler exist that a key or table belongs to, even if it sets nothing.
func (d *decoder) mention(path []string, at place) {
	if len(path) < 2 || path[0] != "handlers" {
		return
	}
	name := path[1]
	d.handlers[name] = append(d.handlers[name], func(*VM) {})
	if table := dotted(path[:2]); len(path) == 2 || d.places[table] == (place{}) {
		d.places[table] = at
	}
}

// strict has the whole document read by go-toml too, which knows the rules that decode does not check, such
// as that a table is not written in two ways, or numbers with leading zeros. found are the problems of the
// document that decode reported.
func (d *decoder) strict(doc *document, found []error) {
	var ignored map[string]any
	err := toml.Unmarshal(doc.content, &ignored)
	if err == nil {
		return
	}
	at, key := place{file: doc.file}, ""
	text := strings.Map(printable, strings.TrimPrefix(err.Error(), "toml: "))
	if located := (*toml.DecodeError)(nil); errors.As(err, &located) {
		at.line, _ = located.Position()
	}
	if len(doc.starts) > 0 { // some of these errors have no position: find the first expression with which it fails
		i := sort.Search(len(doc.starts)-1, func(i int) bool {
			var ignored map[string]any
			return toml.Unmarshal(doc.content[:lineStart(doc.content, doc.starts[i+1].offset)], &ignored) != nil
		})
		key = doc.starts[i].key
		if at.line == 0 {
			at.line = doc.starts[i].line
		}
	}
	for _, known := range found {
		if p := (*problem)(nil); errors.As(known, &p) && p.line == at.line {
			return
		}
	}
	d.broken = true
	d.problem(at, key, "%s", text)
}

// printable keeps what a message quotes of a file from starting a line of its own.
func printable(r rune) rune {
	if unicode.IsPrint(r) {
		return r
	}
	return unicode.ReplacementChar
}

// lineStart is the offset of the first byte of the line that offset is in.
func lineStart(content []byte, offset int) int {
	return bytes.LastIndexByte(content[:offset], '\n') + 1
}

// locate is the full path of an expression's key, and where it is written.
func (doc *document) locate(table []string, e *unstable.Node) ([]string, place, int) {
	path := append([]string(nil), table...)
	offset := -1
	for it := e.Key(); it.Next(); {
		n := it.Node()
		if offset < 0 {
			offset = int(n.Raw.Offset)
		}
		path = append(path, string(n.Data))
	}
	offset = max(doc.scanned, offset)
	doc.newlines += bytes.Count(doc.content[doc.scanned:offset], []byte{'\n'})
	doc.scanned = offset
	return path, place{doc.file, 1 + doc.newlines}, offset
}

// lookup finds what a key stands for: the value to set, or the zero Value for a table. Keys of handlers are
// those of [vm].
func (d *decoder) lookup(path []string) (reflect.Value, bool) {
	v := reflect.ValueOf(&d.config).Elem()
	for i, name := range path {
		if v.Type() == reflect.TypeFor[map[string]VM]() {
			v = reflect.ValueOf(&VM{}).Elem()
			continue
		}
		next, ok := child(v, name)
		if !ok {
			return reflect.Value{}, false
		}
		if v = next; v.Kind() != reflect.Struct && v.Kind() != reflect.Map {
			return v, i == len(path)-1
		}
	}
	return reflect.Value{}, true
}

// child is the field of a struct with a TOML key.
func child(v reflect.Value, key string) (reflect.Value, bool) {
	if v.Kind() != reflect.Struct {
		return reflect.Value{}, false
	}
	for i := range v.NumField() {
		if v.Type().Field(i).Tag.Get("toml") == key {
			return v.Field(i), true
		}
	}
	return reflect.Value{}, false
}

// dotted is a key as TOML writes it.
func dotted(path []string) string {
	var b strings.Builder
	for i, part := range path {
		if i > 0 {
			b.WriteByte('.')
		}
		bare := part != ""
		for _, r := range part {
			bare = bare && (r == '-' || r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z')
		}
		if !bare {
			part = strconv.Quote(part)
		}
		b.WriteString(part)
	}
	return b.String()
}
