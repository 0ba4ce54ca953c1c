package main

import (
	_ "embed"
	"fmt"
	"os"
	"strings"
	"text/template"
)

// page is docs/performance.md without figures.
//
//go:embed performance.md.tmpl
var page string

// document writes docs/performance.md: the explanations of the template with the figures of this report.
func (r *report) document(path string) error {
	t, err := template.New("performance.md").Funcs(template.FuncMap{"figures": r.figures}).Parse(page)
	if err != nil {
		return err
	}
	var text strings.Builder
	if err := t.Execute(&text, nil); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text.String()), 0o644)
}

// figures is a section as it stands on the page.
func (r *report) figures(name string) (string, error) {
	for _, s := range r.Sections {
		if s.Name == name {
			var text strings.Builder
			s.print(&text)
			_, body, _ := strings.Cut(text.String(), "\n\n") // the page has headings of its own
			lines := strings.Split(strings.TrimRight(body, "\n"), "\n")
			for i := range lines {
				lines[i] = strings.TrimRight(lines[i], " ")
			}
			return "```\n" + strings.Join(lines, "\n") + "\n```", nil
		}
	}
	for _, m := range measurements {
		if m.name == name {
			return "*Not measured: `make bench BENCHFLAGS=\"-sections " + name + "\"`.*", nil
		}
	}
	return "", fmt.Errorf("the page asks for figures of a section %q, which there is not", name)
}
