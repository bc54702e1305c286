// An OpenID provider on a free port of loopback. Prints its issuer when it listens; a line
// "rotate" on stdin replaces its keys and prints the new key ids; the end of stdin ends it.
import { generateKeyPairSync, randomBytes } from 'node:crypto'
import { createServer } from 'node:http'
import { createInterface } from 'node:readline'

import Provider, { errors } from 'oidc-provider'

console.info = console.error // the package's notices; stdout is for the test
const SECRET = process.env.BATCH_CLIENT_SECRET
const AUDIENCES = ['https://gatehouse.example', 'https://elsewhere.example']

function key(type, options, alg) {
  const { privateKey } = generateKeyPairSync(type, options)
  const kid = randomBytes(8).toString('hex')
  return { ...privateKey.export({ format: 'jwk' }), kid, use: 'sig', alg }
}

function configuration() {
  const keys = [
    key('rsa', { modulusLength: 2048 }, 'RS256'),
    key('ec', { namedCurve: 'P-256' }, 'ES256'),
  ]
  return {
    jwks: { keys },
    cookies: { keys: [randomBytes(32).toString('hex')] },
    clients: [
      {
        client_id: 'desk',
        application_type: 'native',
        token_endpoint_auth_method: 'none',
        redirect_uris: ['http://127.0.0.1/callback'],
      },
      {
        client_id: 'batch',
        client_secret: SECRET,
        grant_types: ['client_credentials'],
        response_types: [],
        redirect_uris: [],
      },
    ],
    pkce: { required: () => true },
    features: {
      devInteractions: { enabled: true },
      clientCredentials: { enabled: true },
      resourceIndicators: {
        enabled: true,
        getResourceServerInfo(ctx, resource, client) {
          if (!AUDIENCES.includes(resource)) throw new errors.InvalidTarget()
          return {
            scope: 'llm.use',
            audience: resource,
            accessTokenFormat: 'jwt',
            accessTokenTTL: 600,
            // Each flow signs with the other kind of key, so that both are tested.
            jwt: { sign: { alg: client.clientId === 'batch' ? 'ES256' : 'RS256' } },
          }
        },
      },
    },
    extraTokenClaims: (ctx, token) => ({
      roles: [token.kind === 'ClientCredentials' ? 'nightly-batch' : 'hr-analyst'],
    }),
    ttl: { Interaction: 600, Session: 600, Grant: 600, IdToken: 600 },
  }
}

let handle
function publish(issuer) {
  const chosen = configuration()
  handle = new Provider(issuer, chosen).callback()
  return chosen.jwks.keys.map(({ kid }) => kid)
}

const server = createServer((request, response) => handle(request, response))
server.listen(0, '127.0.0.1', () => {
  const issuer = `http://127.0.0.1:${server.address().port}`
  const kids = publish(issuer)
  console.log(JSON.stringify({ issuer, kids }))
  const lines = createInterface({ input: process.stdin })
  lines.on('line', (line) => {
    if (line === 'rotate') console.log(JSON.stringify({ issuer, kids: publish(issuer) }))
  })
  lines.on('close', () => process.exit(0))
})
