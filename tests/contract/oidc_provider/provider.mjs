// A certified OpenID provider with one public and one confidential client, for one test run.
// It listens on a free port of loopback and prints one line: its issuer URL.
// POST /rotate publishes a new signing key in front of the old one; the provider holds its keys
// from the start, so rotation exchanges the provider behind the same issuer.
import { generateKeyPairSync } from 'node:crypto';
import { createServer } from 'node:http';

import Provider from 'oidc-provider';

const RESOURCE = 'https://gatehouse.example/api';
const SCOPE = 'llm.use';
const ecKey = newKey('key-ec', 'ec', { namedCurve: 'P-256' }, 'ES256');
let keys = [newKey('key-1')];

function newKey(kid, type = 'rsa', options = { modulusLength: 2048 }, alg = 'RS256') {
  const { privateKey } = generateKeyPairSync(type, options);
  return { ...privateKey.export({ format: 'jwk' }), kid, use: 'sig', alg };
}

function createProvider(issuer) {
  return new Provider(issuer, {
    jwks: { keys: [...keys, ecKey] },
    cookies: { keys: ['only for this test run'] },
    clients: [
      {
        client_id: 'desktop',
        token_endpoint_auth_method: 'none',
        application_type: 'native',
        redirect_uris: ['http://127.0.0.1/callback'],
        grant_types: ['authorization_code'],
        response_types: ['code'],
        scope: `openid ${SCOPE}`,
      },
      {
        client_id: 'nightly-batch',
        client_secret: 'a secret for this test run only',
        redirect_uris: [],
        grant_types: ['client_credentials'],
        response_types: [],
        scope: SCOPE,
      },
    ],
    scopes: ['openid', SCOPE],
    findAccount: (ctx, sub) => ({ accountId: sub, claims: () => ({ sub }) }),
    // Whoever signs in has agreed to everything: the browser part is not what is tested.
    loadExistingGrant: async (ctx) => {
      const grant = new ctx.oidc.provider.Grant({
        clientId: ctx.oidc.client.clientId,
        accountId: ctx.oidc.session.accountId,
      });
      grant.addOIDCScope(`openid ${SCOPE}`);
      grant.addResourceScope(RESOURCE, SCOPE);
      await grant.save();
      return grant;
    },
    interactions: { url: (ctx, interaction) => `/interaction/${interaction.uid}` },
    pkce: { required: () => true },
    extraTokenClaims: (ctx, token) => ({
      roles: [token.kind === 'ClientCredentials' ? 'batch' : token.accountId],
    }),
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      resourceIndicators: {
        enabled: true,
        defaultResource: () => RESOURCE,
        useGrantedResource: () => true,
        getResourceServerInfo: (ctx, resource, client) => ({
          scope: SCOPE,
          audience: RESOURCE,
          accessTokenFormat: 'jwt',
          accessTokenTTL: 600,
          // One kind of signature for each flow, so that both are seen.
          jwt: { sign: { alg: client.clientId === 'desktop' ? 'ES256' : 'RS256' } },
        }),
      },
    },
  });
}

let provider;
let answer;
let issuer;

function restart() {
  provider = createProvider(issuer);
  answer = provider.callback();
}

const server = createServer(async (request, response) => {
  if (request.method === 'POST' && request.url === '/rotate') {
    keys = [newKey(`key-${keys.length + 1}`), ...keys];
    restart();
    response.end(keys[0].kid);
  } else if (request.url.startsWith('/interaction/')) {
    // Signs in whom the authorization request hinted at. A native client needs consent each time.
    const { params } = await provider.interactionDetails(request, response);
    const result = { login: { accountId: params.login_hint }, consent: {} };
    await provider.interactionFinished(request, response, result);
  } else {
    answer(request, response);
  }
});

server.listen(0, '127.0.0.1', () => {
  issuer = `http://127.0.0.1:${server.address().port}`;
  restart();
  console.log(issuer);
});
// Ends with the test that started it, whatever happened to that test.
process.stdin.on('end', () => process.exit(0)).resume();
