package conf

import (
	"encoding"
	"fmt"
	"reflect"
	"strconv"

	"github.com/pelletier/go-toml/v2/unstable"
)

// decodeValue turns a value of a document into one of the type of a field of Config.
func decodeValue(t reflect.Type, n *unstable.Node) (reflect.Value, error) {
	out := reflect.New(t)
	wrong := fmt.Errorf("takes %s, not %s", wanted(t), kindName(n.Kind))
	if text, ok := out.Interface().(encoding.TextUnmarshaler); ok {
		if n.Kind != unstable.String && (t != reflect.TypeFor[Size]() || n.Kind != unstable.Integer) {
			return reflect.Value{}, wrong
		}
		if n.Kind == unstable.String {
			return out.Elem(), text.UnmarshalText(n.Data)
		}
	}
	switch v := out.Elem(); {
	case v.Kind() == reflect.String && n.Kind == unstable.String:
		v.SetString(string(n.Data))
		return v, nil
	case v.Kind() == reflect.Bool && n.Kind == unstable.Bool:
		v.SetBool(n.Data[0] == 't')
		return v, nil
	case v.CanInt() && n.Kind == unstable.Integer:
		i, err := integer(n)
		if err == nil && v.OverflowInt(i) {
			err = fmt.Errorf("%d is too large", i)
		}
		if err == nil && t == reflect.TypeFor[Size]() && i < 0 {
			err = fmt.Errorf("%d is negative", i)
		}
		v.SetInt(i)
		return v, err
	case v.CanUint() && n.Kind == unstable.Integer:
		i, err := integer(n)
		if err == nil && i < 0 {
			err = fmt.Errorf("%d is negative", i)
		}
		v.SetUint(uint64(i))
		return v, err
	case v.Kind() == reflect.Slice && n.Kind == unstable.Array:
		list := reflect.MakeSlice(t, 0, 0)
		for it := n.Children(); it.Next(); {
			element, err := decodeValue(t.Elem(), it.Node())
			if err != nil {
				return reflect.Value{}, fmt.Errorf("element %d %w", list.Len()+1, err)
			}
			list = reflect.Append(list, element)
		}
		return list, nil
	}
	return reflect.Value{}, wrong
}

func integer(n *unstable.Node) (int64, error) {
	i, err := strconv.ParseInt(string(n.Data), 0, 64) // TOML's notations are Go's but for leading zeros, see strict
	if err != nil {
		return 0, fmt.Errorf("%.40s is not an integer of 64 bits", n.Data)
	}
	return i, nil
}

// wanted says what a type looks like in TOML.
func wanted(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[Size]():
		return `a size such as "512MiB"`
	case t == reflect.TypeFor[Duration]():
		return `a duration such as "30s"`
	case t.Kind() == reflect.Slice:
		return "an array of strings"
	case t.Kind() == reflect.String:
		return "a string"
	case t.Kind() == reflect.Bool:
		return "true or false"
	}
	return "an integer"
}

func kindName(k unstable.Kind) string {
	switch k {
	case unstable.String:
		return "a string"
	case unstable.Integer:
		return "an integer"
	case unstable.Bool:
		return "a boolean"
	case unstable.Float:
		return "a float"
	case unstable.Array:
		return "an array"
	case unstable.InlineTable:
		return "a table"
	}
	return "a date or time"
}
