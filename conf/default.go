package conf

import (
	_ "embed"
	"slices"
)

//go:embed default.toml
var defaultTOML []byte

// DefaultTOML is the commented file that says what Default does: every key with its default, unit and meaning.
func DefaultTOML() []byte { return slices.Clone(defaultTOML) }
