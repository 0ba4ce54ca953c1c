package store

import "fmt"

// schemaVersion is what this crivm writes. It is raised by whatever an older crivm would misread or drop, and each step
// has a function in migrations and a database of the older kind in testdata.
//
//	1  records as plain JSON
//	2  every record and the schema have a sum, and all records together a digest: what a torn page or a flipped bit
//	   leaves is told from what was written
//
// In all later schemas meta/schema and meta/schema.sum stay what they are, so that an older crivm knows to keep away.
const schemaVersion = 2

// migrations[n] makes contents of schema n+1 contents of schema n+2. They change records only in memory; the file is
// replaced as a whole afterwards, so that a crash leaves the old one or the new one.
var migrations = []func(*contents) error{
	func(*contents) error { return nil }, // 1 to 2: the records stay, their form in the file changes
}

// migrate brings contents to the schema of this crivm, one step after the other.
func migrate(c *contents) error {
	for c.schema < schemaVersion {
		if err := migrations[c.schema-1](c); err != nil {
			return fmt.Errorf("migration from schema %d: %w", c.schema, err)
		}
		c.schema++
	}
	return nil
}
